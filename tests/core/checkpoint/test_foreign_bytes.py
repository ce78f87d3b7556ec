"""Readers of bytes that others may have written: whatever they hold, only our own errors come, and soon.

Three kinds of input for each reader: any bytes; a valid file cut, flipped and stuffed; and, where the file says in JSON
what it is, that JSON with one value replaced by a hostile one while lengths and checksums still fit.
"""

from __future__ import annotations

import itertools
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from foreign_readers import READERS, ForeignReader
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from emoe_core.errors import EmoeError

ROOM_BYTES = 2 << 30
HOSTILE = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "../../x", "\0", "\ud800", "9" * 5000, "load", "__class__", "float32", "x" * 300),
    *([], [[]], {}, [None], {"": None}, [1] * 200, {"x": {"x": {}}}, [0, 1e999], [-1, 2], [2**62, 2**62], [0.5, 1.5]),
]
MOST_CPU_S = 20.0
PROFILE = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
    database=None,
)


@contextmanager
def little_memory() -> Iterator[None]:
    """Let no more than `ROOM_BYTES` be allocated, so that a reader which believes a huge size is found out."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read(reader: ForeignReader, folder: Path, content: bytes) -> None:
    """Read a file with this content; one of our own errors is as good as success."""
    path = folder / reader.file
    path.write_bytes(content)
    started_s = time.process_time()
    try:
        with little_memory():
            reader.read(path)
    except EmoeError as error:
        assert str(error)
    assert time.process_time() - started_s < MOST_CPU_S, "a few bytes keep the reader busy"


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON document."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def replaced(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a document with the value of a path replaced."""
    if not path:
        return value
    changed = dict(node) if isinstance(node, dict) else list(node)
    changed[path[0]] = replaced(node[path[0]], path[1:], value)
    return changed


def edited(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Return bytes with pieces cut out and stuffed in."""
    for at, cut, stuffing in edits:
        at %= len(content) + 1
        content = content[:at] + stuffing + content[at + cut :]
    return content


EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 40), st.binary(max_size=20)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", READERS)
def test_the_sample_is_valid(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = tmp_path / reader.file
    path.write_bytes(reader.wrap(reader.text()))
    if name == "shard_index":
        header = b'{"a":{"dtype":"U8","shape":[32],"data_offsets":[0,32]}}'
        (tmp_path / "x.safetensors").write_bytes(READERS["shard"].wrap(header))
    reader.read(path)


@pytest.mark.parametrize("name", READERS)
@PROFILE
@given(content=st.binary(max_size=300))
@example(content=b"")
@example(content=b"[" * 100_000)
@example(content=b'{"format":' * 50_000)
def test_any_bytes_are_refused_by_our_own_errors(name: str, content: bytes, tmp_path: Path) -> None:
    read(READERS[name], tmp_path, content)
    read(READERS[name], tmp_path, READERS[name].wrap(content))


@pytest.mark.parametrize("name", READERS)
@PROFILE
@given(edits=EDITS, outside=st.booleans())
def test_a_mutated_file_is_read_or_refused_by_our_own_errors(
    name: str, edits: list[tuple[int, int, bytes]], outside: bool, tmp_path: Path
) -> None:
    reader = READERS[name]
    text = reader.text()
    read(reader, tmp_path, edited(reader.wrap(text), edits) if outside else reader.wrap(edited(text, edits)))


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.text()[:1] == b"{"])
def test_no_value_of_a_header_is_believed(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    document = json.loads(reader.text().splitlines()[0] if reader.file.endswith("jsonl") else reader.text())
    for place, value in itertools.product(places(document), HOSTILE):
        content = json.dumps(replaced(document, place, value)).encode()
        try:
            read(reader, tmp_path, reader.wrap(content))
        except Exception as error:
            raise AssertionError(f"{place} = {value!r:.40}") from error
