"""Every reader of bytes that others may have written: a valid sample of its input, and how it is read.

`test_foreign_bytes.py` (hypothesis) and `fuzz/readers.py` (atheris) run the same table. A reader may return or raise
one of our own errors; anything else is a finding.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import xxhash
from safetensors.torch import save

from emoe_core.checkpoint.model_config import read_config
from emoe_core.checkpoint.weight_files import find_shards
from emoe_core.experts.trace import RoutingTrace
from emoe_core.loader.pack_format import Pack, described
from emoe_core.planning.tasks import Profile, TaskProfile
from emoe_core.predictor.network import NetworkShape, ShareNetwork
from emoe_core.predictor.transformer import FORMAT, KEY, PredictorHeader, TransformerPredictor
from emoe_core.scheduler.costs import ServingCosts, TaskLoad
from workbench.quality.profile.masks import mask_by_kl, mask_by_similarity
from workbench.replay.references import read_output
from workbench.serving.simulation.request_traces import read_trace
from workbench.sweep.file import read_sweep
from workbench.tracking.notebook import notebook_parameters

SHAPE = NetworkShape("A", 2, 3, ("qa",), 4, 1, 2)


@dataclass(frozen=True)
class ForeignReader:
    """A reader under test.

    Attributes
    ----------
    file : str
        Name of the file it reads, in a folder of its own.
    text : callable
        Returns the part of a valid file that says what the rest is: a header, or all of it.
    read : callable
        Reads the file of a path as the library does, everything that it would use at once included.
    wrap : callable
        Makes a file of the text: lengths and checksums fit, so that what lies behind them is reached.
    """

    file: str
    text: Callable[[], bytes]
    read: Callable[[Path], object]
    wrap: Callable[[bytes], bytes] = bytes


def written(write: Callable[[Path], object], name: str = "file") -> bytes:
    """Return what a function writes to a path."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()


def shard_header() -> bytes:
    tensors = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    return json.dumps({"__metadata__": {"format": "pt"}} | tensors).encode()


def shard_of(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(32)


def read_shards(path: Path) -> None:
    shards, _ = find_shards(path.parent)
    for ref in shards[0].tensors:
        ref.read()


def index_bytes() -> bytes:
    return json.dumps({"metadata": {"total_size": 32}, "weight_map": {"a": "x.safetensors"}}).encode()


RECORD = bytes(4096)


LAYER = "model.layers.0.mlp.experts"


def pack_header() -> bytes:
    """Return what a pack of one layer with two experts says of its records, as small as alignment allows."""
    param = {"name": "up", "shape": [2, 4], "dtype": "float32", "offset_bytes": 0, "nbytes": 32}
    layer = {"params": [param], "checksums": [f"{xxhash.xxh3_64_intdigest(RECORD):016x}"] * 2}
    header = {"model_type": "mixtral", "dtype": "float32", "expert_format": "auto", "source_hash": "0"}
    return json.dumps(header | {"source_mtimes": {"x": 1}, "layers": {LAYER: layer}}).encode()


def pack_of(header: bytes) -> bytes:
    return described(header.decode(errors="replace"), {LAYER: (2, len(RECORD))}) + 2 * RECORD


def read_pack(path: Path) -> None:
    pack = Pack.open(path)
    for layer in pack.layers:
        layer.spec.views(pack.read_record(layer.spec.index, 0))
    pack.verify()


def predictor_header() -> bytes:
    return json.dumps({"format": FORMAT, **asdict(PredictorHeader("0" * 64, "1" * 64, SHAPE))}).encode()


def predictor_of(header: bytes) -> bytes:
    return save(ShareNetwork(SHAPE).state_dict(), {KEY: header.decode(errors="replace")})


def read_predictor(path: Path) -> None:
    TransformerPredictor.load(path).predict("qa")


def trace_bytes() -> bytes:
    chosen = np.zeros((3, 2, 2), dtype=np.uint16)
    return written(
        RoutingTrace(
            request=np.zeros(3, dtype=np.int32),
            position=np.arange(3, dtype=np.int32),
            prefill=np.ones(3, dtype=bool),
            chosen=chosen,
            served=chosen,
            weight=np.full((3, 2, 2), 0.5, dtype=np.float16),
            tasks={0: "qa"},
            experts=2,
        ).save
    )


def read_routing(path: Path) -> None:
    trace = RoutingTrace.load(path)
    trace.shares()


def profile_bytes() -> bytes:
    task = TaskProfile("qa", (True, False), 20.0, depths=(1,), similarities=(0.9,), coverage=((0.0, 1.0), (0.0, 1.0)))
    return written(Profile("0", "1", 2, {"qa": task}).save)


def read_profile(path: Path) -> None:
    profile = Profile.load(path)
    for task in profile.tasks:
        profile.sensitive(task, 0)
        mask_by_similarity(profile.tasks[task], 0.85)
        mask_by_kl(profile.tasks[task], 0.1)


def costs_bytes() -> bytes:
    load = TaskLoad((3, 4), (5,), 5.0, ((0.5, 0.5),))
    return written(ServingCosts("0", 1e-3, 1e-2, (1, 2), (0.01, 0.015), 1e-3, 0.0, 0.0, (1,), 64, {"qa": load}).save)


def read_costs(path: Path) -> None:
    costs = ServingCosts.load(path)
    costs.step_table_s(4)
    costs.prefill_s(10)
    costs.loads_s(2)


def output_bytes() -> bytes:
    row = {
        "prompt_ids": [1, 2],
        "token_ids": [3],
        "text": "x",
        "hidden": torch.zeros(1, 4),
        "logprobs": torch.zeros(1),
        "trace": {
            "position": torch.arange(3, dtype=torch.int32),
            "prefill": torch.ones(3, dtype=torch.bool),
            "chosen": torch.zeros(3, 2, 2, dtype=torch.int16),
            "weight": torch.zeros(3, 2, 2, dtype=torch.float16),
            "experts": torch.tensor(2),
        },
    }
    return written(lambda path: torch.save(row, path))


def sweep_bytes() -> bytes:
    return (
        b"name: quick\nstages:\n  - notebook: notebooks/01_quickstart.ipynb\n    kind: quality\n"
        b'    fixed: {prompts: 16}\n    grid: {budget: ["20%", 0.5], tolerance: [0.0, 1.0]}\n'
        b'    exclude: [{budget: "20%", tolerance: 0.0}]\n    metrics: [peak_bytes]\n    seconds_per_run: 60\n'
    )


def notebook_bytes() -> bytes:
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["seed = 0\n", "x: int | None = 1\n"]}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()


def read_notebook(path: Path) -> None:
    for parameter in notebook_parameters(path).values():
        parameter.type_names()


def config_bytes() -> bytes:
    return json.dumps(
        {
            "model_type": "mixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "vocab_size": 64,
        }
    ).encode()


def azure_bytes() -> bytes:
    return b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:01:51.1630340,4808,10\n2023-11-16 18:02:00,3,4\n"


def mooncake_bytes() -> bytes:
    return b'{"timestamp": 0, "input_length": 6758, "output_length": 500}\n' * 2


def in_folder(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: read(path.parent)


READERS = {
    "config": ForeignReader("config.json", config_bytes, in_folder(read_config)),
    "costs": ForeignReader("costs.json", costs_bytes, read_costs),
    "mooncake": ForeignReader("trace.jsonl", mooncake_bytes, lambda path: read_trace(path, ["qa"])),
    "azure": ForeignReader("trace.csv", azure_bytes, lambda path: read_trace(path, ["qa"])),
    "notebook": ForeignReader("book.ipynb", notebook_bytes, read_notebook),
    "pack": ForeignReader("pack.emoe", pack_header, read_pack, pack_of),
    "predictor": ForeignReader("predictor.safetensors", predictor_header, read_predictor, predictor_of),
    "profile": ForeignReader("profile.json", profile_bytes, read_profile),
    "reference_output": ForeignReader("output.pt", output_bytes, read_output),
    "routing": ForeignReader("routing.npz", trace_bytes, read_routing),
    "shard": ForeignReader("model.safetensors", shard_header, read_shards, shard_of),
    "shard_index": ForeignReader("model.safetensors.index.json", index_bytes, in_folder(find_shards)),
    "sweep": ForeignReader("sweep.yaml", sweep_bytes, read_sweep),
}
