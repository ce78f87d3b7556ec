"""Opening files and memory, cut short at any line by any error: no file, thread, mapping or half a pack stays."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import pytest
import transformers
from transformers import AutoModelForCausalLM

import emoe_core
from emoe_core import device
from emoe_core import engine as engine_module
from emoe_core.checkpoint import index as checkpoint
from emoe_core.checkpoint import safetensors_files as shards
from emoe_core.checkpoint import weight_files
from emoe_core.checkpoint.index import CheckpointIndex, open_checkpoint
from emoe_core.checkpoint.safetensors_files import fingerprint
from emoe_core.checkpoint.weight_files import find_shards
from emoe_core.device import Device
from emoe_core.errors import EmoeError
from emoe_core.experts import attach as attachment
from emoe_core.loader import direct_io, pack, pack_format, slot_memory, storage
from emoe_core.loader.loader import ExpertLoader
from emoe_core.loader.pack import compare_with_checkpoint, ensure_pack
from emoe_core.loader.slot_memory import SlotMemory
from emoe_core.loader.slots import Entry
from emoe_core.loader.storage import HostMemory, PackedFile

SOURCES = {
    module.__file__
    for module in (checkpoint, device, direct_io, pack, pack_format, shards, slot_memory, storage, weight_files)
}
Line = tuple[str, int]


class Closable(Protocol):
    def close(self) -> None: ...


@contextmanager
def at_lines(act: Callable[[Line], None], sources: Collection[str | None] = SOURCES) -> Iterator[None]:
    """Call a function before every line of our own loading that runs."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in sources:
            return None
        if event == "line":
            act((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def held() -> tuple[list[str], int, int]:
    """Return what this process holds: open files, reading threads, and shared mappings without a file (buffers).

    Other threads, and files of theirs, come and go as libraries please, so it is read until two readings agree.
    """
    found = _held_now()
    for _ in range(100):
        before, found = found, _held_now()
        if before == found:
            break
    return found


def _held_now() -> tuple[list[str], int, int]:
    files = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            files.append(str(link.readlink()))
    mapped = sum("/dev/zero" in line for line in Path("/proc/self/maps").read_text().splitlines())
    threads = sum(thread.name.startswith("emoe") for thread in threading.enumerate())
    return sorted(files), threads, mapped


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="20KB")
    return open_checkpoint(path)


class NothingOpen:
    """What is left of a step that closes all it opened."""

    def close(self) -> None: ...


def shards_read(index: CheckpointIndex, folder: Path) -> Closable:
    found, _ = find_shards(index.path)
    fingerprint(found)
    found[0].tensors[0].read()
    return NothingOpen()


def new_pack(index: CheckpointIndex, folder: Path) -> Closable:
    for file in (folder / "new").glob("*"):
        file.unlink()
    ensure_pack(index, folder / "new")
    return NothingOpen()


def pack_of_a_copy(index: CheckpointIndex, folder: Path) -> Closable:
    later = tuple(replace(shard, mtime_ns=shard.mtime_ns + 1) for shard in index.shards)
    (folder / "new").mkdir(exist_ok=True)
    compare_with_checkpoint(ensure_pack(replace(index, shards=later), folder), index)
    return NothingOpen()


def slots_written(index: CheckpointIndex, folder: Path) -> Closable:
    records = PackedFile(ensure_pack(index, folder))
    try:
        memory = SlotMemory(index.layers, records, 4, Device())
        memory.write(Entry(layer=0, expert=3, slot=1), None)
        return memory
    finally:
        records.close()


STEPS: dict[str, Callable[[CheckpointIndex, Path], Closable]] = {
    "shards": shards_read,
    "a new pack": new_pack,
    "the pack of a copy": pack_of_a_copy,
    "direct reads": lambda index, folder: PackedFile(ensure_pack(index, folder)),
    "buffered reads": lambda index, folder: PackedFile(ensure_pack(index, folder), direct=False),
    "host memory": lambda index, folder: HostMemory(ensure_pack(index, folder)),
    "slots": slots_written,
}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process holds is read from Linux's /proc")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("error", [OSError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("step", STEPS)
def test_an_error_at_any_line_leaves_nothing_open(
    index: CheckpointIndex, tmp_path: Path, step: str, error: type[BaseException]
) -> None:
    ensure_pack(index, tmp_path)
    lines: dict[Line, None] = {}
    with at_lines(lambda line: lines.setdefault(line)):
        STEPS[step](index, tmp_path).close()
    assert len(lines) > 20
    before = held()
    for wanted in lines:

        def fail(line: Line, wanted: Line = wanted) -> None:
            if line == wanted:
                raise error("injected")

        with suppress(error, EmoeError), at_lines(fail):
            STEPS[step](index, tmp_path).close()
        assert held() == before, wanted
        assert {file.suffix for file in tmp_path.rglob("*.*")} <= {".emoe", ".json"}, wanted


ENGINE = {engine_module.__file__, attachment.__file__}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process holds is read from Linux's /proc")
def test_an_error_at_any_line_of_an_engine_s_loading_leaves_nothing_open(
    index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[object] = []

    class Kept(PackedFile):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            # Kept alive, so that nothing is closed by being forgotten.
            kept.append(self)

    class KeptLoader(ExpertLoader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.append(self)

    monkeypatch.setattr(engine_module, "PackedFile", Kept)
    monkeypatch.setattr(engine_module, "ExpertLoader", KeptLoader)

    def load() -> None:
        emoe_core.load(index.path, pack_dir=tmp_path, budget="2 slots", record=True).close()

    load()
    lines: dict[Line, None] = {}
    with at_lines(lambda line: lines.setdefault(line), ENGINE):
        load()
    assert len(lines) > 60 and len(kept) == 4
    before = held()
    for wanted in lines:

        def fail(line: Line, wanted: Line = wanted) -> None:
            # What closes is not cut short: a second error would be a test of something else.
            if line == wanted and not any(frame.function == "close" for frame in inspect.stack(0)):
                raise MemoryError("injected")

        with suppress(MemoryError, EmoeError), at_lines(fail, ENGINE):
            load()
        assert held() == before, wanted
