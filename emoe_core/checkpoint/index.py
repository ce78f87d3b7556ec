"""Open a Hugging Face MoE checkpoint: which experts it has, how one is read, and the model without its experts.

Terms. A *record* is one expert's bytes: its slice of every stacked parameter of the experts module, in the module's
own layout and dtype, each as aligned as stock transformers has it, padded to a multiple of 4 KiB. A *MoE layer* is one
experts module; layers are numbered 0, 1, ... among MoE layers only. *Dense* is all but routed experts.

The checkpoint is only read, never changed, and no code from it is run. Quantised checkpoints are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import _get_dtype

from emoe_core.checkpoint.adapters import adapter_of
from emoe_core.checkpoint.backbone import build_dense_model, meta_model
from emoe_core.checkpoint.conversion import ParamSource, match_sources, target_dtype
from emoe_core.checkpoint.model_config import expert_count, find_model, read_config, top_k
from emoe_core.checkpoint.quantization import SCALE, int8_layer, quantize
from emoe_core.checkpoint.safetensors_files import ALIGNMENT, Shard, TensorRef, fingerprint, tensors_by_name
from emoe_core.checkpoint.weight_files import find_shards
from emoe_core.device import aligned_starts
from emoe_core.errors import CheckpointError, UnsupportedFamilyError, require_known

RECORD_ALIGN_BYTES = 4096
EXPERT_DTYPES = ("auto", "int8")
_DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ParamSpec:
    """One parameter within a record: ``shape`` is without the expert axis, ``offset_bytes`` from the record's start."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True)
class MoeLayer:
    """One experts module: its name in the model, its number among MoE layers, and the layout of its records."""

    name: str
    index: int
    num_experts: int
    params: tuple[ParamSpec, ...]
    record_bytes: int

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return each parameter as a view of a record (uint8 ``[record_bytes]``); nothing is copied."""
        return {
            spec.name: record[spec.offset_bytes : spec.offset_bytes + spec.nbytes].view(spec.dtype).view(spec.shape)
            for spec in self.params
        }

    def aligned(self, align_bytes: int | None) -> MoeLayer:
        """Return the layout in which each parameter starts at a multiple of so many bytes; None: this one."""
        if align_bytes is None:
            return self
        starts = aligned_starts((spec.nbytes for spec in self.params), align_bytes)
        assert starts[-1] <= self.record_bytes, (self, align_bytes)
        specs = (replace(spec, offset_bytes=start) for spec, start in zip(self.params, starts, strict=False))
        return replace(self, params=tuple(specs))


@dataclass(frozen=True)
class CheckpointIndex:
    """A checkpoint whose experts can be read one by one.

    Attributes
    ----------
    path : Path
        Directory of the checkpoint.
    config : PreTrainedConfig
        A configuration of our own; models get copies of it.
    model_type : str
    dtype : torch.dtype
        Dtype of the model ("auto" resolved).
    layers : tuple of MoeLayer
    top_k : int
        Experts a token is routed to.
    source_hash : str
        SHA-256 naming the weights (see `emoe_core.checkpoint.safetensors_files.fingerprint`).
    expert_bytes_total, dense_bytes_total : int
        Bytes of all records with their padding; bytes of all other weights in the model's dtype.
    expert_dtype : str
        How records hold experts: "auto" (as the module has them) or "int8" (see `quantization.py`).
    """

    path: Path
    config: PreTrainedConfig
    model_type: str
    dtype: torch.dtype
    layers: tuple[MoeLayer, ...]
    top_k: int
    source_hash: str
    expert_bytes_total: int
    dense_bytes_total: int
    shards: tuple[Shard, ...] = field(repr=False)
    _sources: Mapping[str, ParamSource] = field(repr=False)
    _dense: Mapping[str, TensorRef] = field(repr=False)
    expert_dtype: str = "auto"

    def with_expert_dtype(self, name: str) -> CheckpointIndex:
        """Return the index with records of another kind; OptionError for an unknown one, or where it cannot be."""
        require_known(name, EXPERT_DTYPES, "expert_dtype")
        if name == self.expert_dtype:
            return self
        layers = tuple(int8_layer(layer) for layer in self.layers)
        total = sum(layer.num_experts * layer.record_bytes for layer in layers)
        return replace(self, layers=layers, expert_bytes_total=total, expert_dtype=name)

    def expert_tensors(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Return one expert's parameters as stock loading would place them in ``module.<param>[expert]``.

        Only this expert's bytes are read.
        """
        spec = self.layers[layer]
        names = {param.name: f"{spec.name}.{param.name}" for param in spec.params}
        return {name: self._sources[key].read_expert(expert) for name, key in names.items() if key in self._sources}

    def read_record(self, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fill ``out`` (uint8 ``[record_bytes]``) with one expert's record, padding zeroed."""
        spec = self.layers[layer]
        out.zero_()
        views = spec.views(out)
        for name, tensor in self.expert_tensors(layer, expert).items():
            if name + SCALE in views:
                tensor, scale = quantize(tensor.to(views[name + SCALE].dtype))
                views[name + SCALE].copy_(scale)
            views[name].copy_(tensor)

    @property
    def fused(self) -> bool:
        """Whether one tensor on disk holds all experts of a layer, rather than one of them."""
        return any(source.fused for source in self._sources.values())

    def source_mtimes(self) -> dict[str, int]:
        """Return each shard's modification time in nanoseconds, by its name, as it was when the index was made."""
        return {shard.name: shard.mtime_ns for shard in self.shards}

    def build_model(
        self,
        device: str | torch.device = "cpu",
        attn_implementation: str | None = None,
        experts_implementation: str | None = None,
    ) -> PreTrainedModel:
        """Return the stock transformers model in evaluation mode with all weights but the routed experts.

        Expert parameters stay on the meta device. Everything else is bit for bit what ``from_pretrained`` loads.

        Raises
        ------
        CheckpointError
            When a tensor of the model is missing from the checkpoint or has another shape.
        """
        return build_dense_model(
            deepcopy(self.config),
            self.dtype,
            self.path,
            dict(self._dense),
            frozenset(self._sources),
            torch.device(device),
            attn_implementation,
            experts_implementation,
        )


def open_checkpoint(path: str | Path, dtype: str | torch.dtype = "auto") -> CheckpointIndex:
    """Index a checkpoint without loading its weights.

    Parameters
    ----------
    path : str or Path
        A local directory, or the id of a model on the Hugging Face hub, which is then downloaded.
    dtype : str or torch.dtype
        "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".

    Raises
    ------
    CheckpointError
        When there is no model, it is dense, quantised, incomplete, or not in safetensors.
    UnsupportedFamilyError
        When the family's experts cannot be served.
    OptionError
        When the dtype is unknown.
    """
    requested = parse_dtype(dtype)
    folder = find_model(path)
    config = read_config(folder)
    shards, metadata = find_shards(folder, getattr(config, "transformers_weights", None))
    config, resolved = _get_dtype(
        requested, [str(shard.file) for shard in shards], config, metadata or None, None, True
    )
    try:
        model = meta_model(deepcopy(config), resolved)
    except Exception as error:  # every family checks its configuration in its own way
        raise CheckpointError(f"{folder}: no model can be made from its configuration ({error}).") from error
    modules = _experts_modules(model, folder)
    expert_params = {
        f"{name}.{key}": parameter for name, params in modules.items() for key, parameter in params.items()
    }
    sources, dense = match_sources(model, tensors_by_name(shards).values(), expert_params, resolved)
    layers = tuple(_layer(index, name, params, sources) for index, (name, params) in enumerate(modules.items()))
    return CheckpointIndex(
        path=folder,
        config=config,
        # The class's own: a file may say anything, and the name becomes part of the pack's file name.
        model_type=type(config).model_type,
        dtype=resolved,
        layers=layers,
        top_k=top_k(config),
        source_hash=fingerprint(shards),
        expert_bytes_total=sum(layer.num_experts * layer.record_bytes for layer in layers),
        dense_bytes_total=_dense_bytes(model, set(expert_params), resolved),
        shards=shards,
        _sources=sources,
        _dense=dense,
    )


def parse_dtype(name: str | torch.dtype) -> str | torch.dtype:
    """Return the dtype that a name stands for, "auto" as it is; OptionError when it names none."""
    if isinstance(name, torch.dtype):
        return name
    require_known(name, _DTYPE_NAMES, "dtype")
    return name if name == "auto" else getattr(torch, name)


def _experts_modules(model: PreTrainedModel, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the stacked parameters of every module that uses transformers' experts interface or has an adapter."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None:
            found[name] = adapter.params(module)
            continue
        if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "_apply_gate")):
            continue
        params = dict(module.named_parameters(recurse=False))
        counts = {parameter.shape[0] for parameter in params.values()}
        if len(counts) != 1:
            raise UnsupportedFamilyError(
                f"model type {model.config.model_type!r}: {name} holds parameters without a common expert axis "
                f"({ {key: tuple(value.shape) for key, value in params.items()} })."
            )
        found[name] = params
    if found:
        return found
    model_type, experts = model.config.model_type, expert_count(model.config)
    if experts > 1:
        raise UnsupportedFamilyError(
            f"model type {model_type!r} at {folder} has {experts} experts, but transformers does not route this "
            f"family through its experts interface, so emoe cannot serve it."
        )
    raise CheckpointError(
        f"{folder} ({model_type}) has no MoE layer: it is a dense model, and there are no experts to keep or to load. "
        f"Run it with stock transformers."
    )


def _layer(index: int, name: str, params: Mapping[str, torch.Tensor], sources: Mapping[str, ParamSource]) -> MoeLayer:
    specs = []
    offset = 0
    for key, parameter in params.items():
        source = sources[f"{name}.{key}"]
        dtype = source.dtype
        nbytes = parameter[0].numel() * dtype.itemsize
        # As aligned as in stock transformers: see `shards.empty_as_mapped`.
        lead = (source.mapped_offset_bytes or 0) % ALIGNMENT
        offset += lead - lead % dtype.itemsize
        specs.append(ParamSpec(key, tuple(parameter.shape[1:]), dtype, offset, nbytes))
        offset = _round_up(offset + nbytes, ALIGNMENT)
    num_experts = next(iter(params.values())).shape[0]
    # Long enough also for the layout that devices with allocations of their own take (`MoeLayer.aligned`).
    end = max(offset, aligned_starts(spec.nbytes for spec in specs)[-1])
    return MoeLayer(name, index, num_experts, tuple(specs), _round_up(end, RECORD_ALIGN_BYTES))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _dense_bytes(model: PreTrainedModel, expert_names: set[str], dtype: torch.dtype) -> int:
    skipped = expert_names | set(model.all_tied_weights_keys)
    stored = set(model.state_dict())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(
        tensor.numel() * (target_dtype(model, name, tensor, dtype) if name in stored else tensor.dtype).itemsize
        for name, tensor in tensors.items()
        if name not in skipped
    )
