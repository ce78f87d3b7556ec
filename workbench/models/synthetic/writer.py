"""Write a checkpoint of a shape with random weights, tensor by tensor, as transformers itself would lay it out.

Names and layout come from the model class on the meta device and transformers' own reverse conversion, so the result
loads with stock ``from_pretrained``. Weights are normal with the usual deviation, norms are one, biases small. Each
tensor's values depend on the seed and its name only. Memory stays below that of one piece (`PIECE_VALUES`).

Interruption: a shard appears under its name when it is complete, and the shards' index comes last, so a folder that
was not finished cannot be loaded; the same call goes on where it stopped. ``synthetic.json`` says what was made.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from emoe_core.checkpoint.safetensors_files import byte_view, file_head
from emoe_core.errors import DataError, OptionError, require_known
from emoe_core.experts.trace import RoutingTrace
from emoe_core.files import SCRATCH, whole_file, write_whole
from emoe_core.loader.cache_folder import cache_dir
from workbench.models.reference.tiny import tiny_tokenizer
from workbench.models.synthetic.composed_trace import compose
from workbench.models.synthetic.shapes import Shape
from workbench.models.synthetic.written_routing import RESIDUAL_SHARE, WrittenRouting

LABEL_FILE, TRACE_FILE, INDEX_FILE = "synthetic.json", "routing.npz", "model.safetensors.index.json"
SHARD_BYTES = 10**9
PIECE_VALUES = 2**22
DEVIATION = 0.02
_DTYPES = {"bfloat16": ("BF16", torch.bfloat16), "float32": ("F32", torch.float32), "float16": ("F16", torch.float16)}
# What the last matrices before the residual stream are called, over the families.
_OUTPUTS = ("o_proj", "down_proj", ".w2.")
_ROUTERS = (".gate.weight", ".router.weight")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tensor:
    """One tensor to write; ``moe_layer`` is the number of the MoE layer whose router it is, else None."""

    name: str
    shape: tuple[int, ...]
    moe_layer: int | None = None

    @property
    def values(self) -> int:
        return math.prod(self.shape)


def tensors_of(shape: Shape) -> list[Tensor]:
    """Return the tensors of a checkpoint of this shape, as transformers saves them, layer by layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    state = revert_weight_conversion(model, model.state_dict())
    numbers = sorted({_layer(name) for name in state if _is_router(name)})
    tensors = [
        Tensor(name, tuple(value.shape), numbers.index(_layer(name)) if _is_router(name) else None)
        for name, value in state.items()
    ]
    return sorted(tensors, key=lambda tensor: (_layer(tensor.name), tensor.name))


def write_synthetic(
    out: str | Path,
    shape: Shape,
    label: str,
    *,
    trace: RoutingTrace | None = None,
    trace_source: str | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint and return its folder.

    Parameters
    ----------
    out : str or Path
        Folder, new or of an interrupted call with the same arguments.
    shape : Shape
    label : str
        What the shape was made from, for the card ("olmoe-1b-7b at scale 0.25").
    trace : RoutingTrace, optional
        Routing to write into the weights (`written_routing.py`), of the shape's MoE layers, experts and top-k.
    trace_source : str, optional
        Where that came from, for the card.
    dtype, seed
    shard_bytes : int
        A shard is closed once it is this large.
    jobs : int
        Shards that are written at once.
    progress : callable, optional
        Called with (bytes written, bytes in all).

    Raises
    ------
    OptionError
        When the dtype is unknown, the trace does not fit, or the folder holds something else.
    DataError
        When the disk has too little space; nothing is written then.
    """
    require_known(dtype, _DTYPES, "dtype")
    folder, tensors = Path(out), tensors_of(shape)
    written = None if trace is None else _written(trace, tensors, shape, seed)
    record = {
        "random_weights": True,
        "label": label,
        "shape": asdict(shape),
        "dtype": dtype,
        "seed": seed,
        "shard_bytes": shard_bytes,
        "routing": _routing_record(written, trace_source),
    }
    shards = _shards(tensors, dtype, shard_bytes)
    if _prepare(folder, record):
        return folder
    done = _finished_bytes(folder, shards, dtype)
    total = sum(tensor.values for tensor in tensors) * _DTYPES[dtype][1].itemsize
    _check_space(folder, total - done)
    if trace is not None:
        trace.save(folder / TRACE_FILE)
    lock = threading.Lock()

    def write(number: int) -> None:
        nonlocal done
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if path.exists():
            return
        try:
            with whole_file(path) as scratch, scratch.open("wb") as stream:
                stream.write(_head(shards[number - 1], dtype))
                for tensor in shards[number - 1]:
                    for piece in _pieces(tensor, written, shape.layers, seed):
                        _write_piece(stream, piece, dtype)
                        with lock:
                            done += piece.numel() * _DTYPES[dtype][1].itemsize
                            if progress is not None:
                                progress(done, total)
                stream.flush()
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise DataError(
                f"cannot write {path} ({error.strerror or error}). Free space and give the same command again: "
                f"finished shards are kept."
            ) from error

    numbers = range(1, len(shards) + 1)
    if jobs == 1:
        for number in numbers:
            write(number)
    else:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(write, numbers))
    _finish(folder, shape, shards, dtype, total, record)
    return folder


def cached_folder(label: str, routing: str, dtype: str, seed: int) -> Path:
    """Return where a checkpoint that was made from these rests in the cache."""
    name = f"{label.replace(' at scale 1', '')} {dtype} {Path(routing).stem} seed {seed}"
    return cache_dir() / "synthetic" / name.replace(" ", "-").replace(",", "").replace(".", "_")


def laid_out(trace: RoutingTrace, shape: Shape) -> RoutingTrace:
    """Return a recorded trace as it is written into a shape: of its MoE layers, experts and top-k."""
    moe_layers = sum(tensor.moe_layer is not None for tensor in tensors_of(shape))
    return compose(trace, moe_layers, shape.experts, shape.top_k)


def label_of(checkpoint: str | Path) -> dict[str, Any] | None:
    """Return what ``synthetic.json`` says of a checkpoint, or None when it is not one of these."""
    file = Path(checkpoint) / LABEL_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def _written(trace: RoutingTrace, tensors: list[Tensor], shape: Shape, seed: int) -> WrittenRouting:
    moe_layers = sum(tensor.moe_layer is not None and tensor.name.endswith("weight") for tensor in tensors)
    wanted = (moe_layers, shape.experts, shape.top_k)
    found = (trace.chosen.shape[1], trace.experts, trace.chosen.shape[2])
    if found != wanted:
        raise OptionError(f"the trace has (MoE layers, experts, top-k) {found}, the shape {wanted}: compose it first")
    return WrittenRouting(trace, shape.hidden, shape.vocab, seed)


def _routing_record(written: WrittenRouting | None, source: str | None) -> dict[str, Any]:
    if written is None:
        return {"kind": "random routers"}
    digest = hashlib.sha256(np_bytes(written.trace)).hexdigest()[:24]
    return {
        "kind": "recorded routing, written into the weights",
        "source": source or "a recorded trace",
        "tokens": len(written.trace),
        "agreement": round(written.agreement(), 5),
        "trace": digest,
    }


def np_bytes(trace: RoutingTrace) -> bytes:
    """Return what names a trace's routing."""
    return trace.chosen.tobytes() + trace.weight.tobytes() + trace.request.tobytes()


def _prepare(folder: Path, record: dict[str, Any]) -> bool:
    """Make the folder, or see that it is an unfinished one of the same arguments; True when it is finished."""
    label = folder / LABEL_FILE
    if label.exists():
        if json.loads(label.read_text()) != json.loads(json.dumps(record)):
            raise OptionError(f"{folder} holds another synthetic checkpoint: give another --out, or remove the folder")
        if (folder / INDEX_FILE).exists():
            return True
        for left in folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(left)
        return False
    if folder.exists() and any(folder.iterdir()):
        raise OptionError(f"{folder} is not empty and holds no synthetic checkpoint: give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    label.write_text(json.dumps(record, indent=1))
    return False


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    # Some room remains for others.
    short = needed_bytes + 10**8 - free_bytes
    if short > 0:
        raise DataError(
            f"the checkpoint needs {needed_bytes:,} more bytes, {folder} has {free_bytes:,} free: {short:,} short. "
            f"Free space, choose another --out, or a smaller --scale."
        )


def _shards(tensors: list[Tensor], dtype: str, shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size >= shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.values * _DTYPES[dtype][1].itemsize
    return shards


def _finished_bytes(folder: Path, shards: list[list[Tensor]], dtype: str) -> int:
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    sizes = [sum(tensor.values for tensor in shard) * _DTYPES[dtype][1].itemsize for shard in shards]
    return sum(size for name, size in zip(names, sizes, strict=True) if (folder / name).exists())


def _head(shard: list[Tensor], dtype: str) -> bytes:
    name, kind = _DTYPES[dtype]
    tensors = {tensor.name: (name, tensor.shape, tensor.values * kind.itemsize) for tensor in shard}
    return file_head(tensors, {"format": "pt"})


def _pieces(tensor: Tensor, written: WrittenRouting | None, layers: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield a tensor's values in order, float32."""
    name = tensor.name
    if written is not None and name.endswith("embed_tokens.weight"):
        step = max(1, PIECE_VALUES // tensor.shape[1])
        for start in range(0, tensor.shape[0], step):
            yield torch.from_numpy(written.embeddings(start, min(start + step, tensor.shape[0])).astype("float32"))
        return
    if written is not None and tensor.moe_layer is not None and name.endswith("weight"):
        yield torch.from_numpy(written.router(tensor.moe_layer))
        return
    if "norm" in name and name.endswith("weight"):
        yield torch.ones(tensor.shape)
        return
    if len(tensor.shape) == 1 and written is not None:
        yield torch.zeros(tensor.shape)
        return
    deviation = DEVIATION
    if any(part in name for part in _OUTPUTS):
        deviation /= math.sqrt(2 * layers)
        deviation *= 1.0 if written is None else RESIDUAL_SHARE
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
    generator = torch.Generator().manual_seed(key)
    for start in range(0, tensor.values, PIECE_VALUES):
        count = min(PIECE_VALUES, tensor.values - start)
        yield torch.randn(count, generator=generator).mul_(deviation)


def _write_piece(stream: BinaryIO, piece: torch.Tensor, dtype: str) -> None:
    kind = _DTYPES[dtype][1]
    stream.write(byte_view(piece.to(kind).contiguous()))


def _finish(
    folder: Path, shape: Shape, shards: list[list[Tensor]], dtype: str, total: int, record: dict[str, Any]
) -> None:
    config = shape.config(dtype)
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(_card(shape, dtype, total, record))
    weight_map = {
        tensor.name: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, shard in enumerate(shards, start=1)
        for tensor in shard
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_whole(folder / INDEX_FILE, json.dumps(index, indent=1))


def _card(shape: Shape, dtype: str, total: int, record: dict[str, Any]) -> str:
    routing = record["routing"]
    source = f" ({routing['source']}; {routing['tokens']} tokens)" if "source" in routing else ""
    return (
        f"# RANDOM WEIGHTS: {record['label']}\n\n"
        f"This checkpoint has the shape of a model and none of its knowledge; it is for measuring memory and speed. "
        f"Its text is noise.\n\n"
        f"- Family {shape.family}, {shape.layers} layers, {shape.experts} experts, top-{shape.top_k}, hidden "
        f"{shape.hidden}, expert width {shape.intermediate}, vocabulary {shape.vocab}; {dtype}, {total:,} bytes\n"
        f"- Seed {record['seed']}\n"
        f"- Routing: {routing['kind']}{source}\n"
    )


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _is_router(name: str) -> bool:
    return "layers." in name and name.endswith(_ROUTERS)
