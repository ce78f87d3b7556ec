"""From a checkpoint's tensor names to the parameters of an experts module, one expert at a time.

Checkpoints store experts in many ways: a tensor per expert and projection (Mixtral's ``w1``, ``w3``, ``w2``), or one
*fused* tensor with a leading expert axis. transformers describes each family by renamings and converters (chains of
operations such as stack, concatenate, transpose). This module runs those same operations on one expert's tensors, as
if the layer had a single expert, so a record holds bit for bit what stock loading puts in ``module.<param>[expert]``.

It does not hand-write any family, and refuses a chain that mixes experts with each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from emoe_core.checkpoint.safetensors_files import TensorRef
from emoe_core.errors import CheckpointError, UnsupportedFamilyError


class _OneExpertShapes:
    """Stands for the model in conversion operations that ask for a target's shape: the same, with one expert."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty((1, *self._shape[1:]), device="meta")


@dataclass(frozen=True)
class ParamSource:
    """The tensors on disk behind one stacked parameter, and the operations that make it from them.

    ``sources`` maps the converter's source pattern to its tensors: one a expert, or a single fused one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: Mapping[str, tuple[TensorRef, ...]]
    converter: WeightConverter | None
    fused: bool
    config: Any

    def read_expert(self, expert: int) -> torch.Tensor:
        """Return ``parameter[expert]`` (contiguous, in the model's dtype), reading only this expert's bytes."""
        collected = {
            # Cast before the operations, as the stock loader does.
            pattern: (refs[0].read_row(expert) if self.fused else refs[expert].read()).to(self.dtype)
            for pattern, refs in self.sources.items()
        }
        return self._convert(collected, expert)

    @property
    def mapped_offset_bytes(self) -> int | None:
        """Where the stacked parameter starts in its file if stock transformers computes with a view of it, else None.

        Whatever is stacked from several tensors, converted or cast is memory of its own.
        """
        if not self.fused or len(self.sources) != 1:
            return None
        ((pattern, (ref,)),) = self.sources.items()
        if ref.dtype != self.dtype:
            return None
        whole = torch.empty((1, *ref.shape[1:]), device="meta")
        # Some operations leave a tensor alone that has the expected shape already.
        return ref.offset_bytes if self._converted({pattern: whole}) is whole else None

    def check_shapes(self) -> None:
        """Raise CheckpointError unless every expert's tensors convert to the parameter's shape; reads nothing."""
        for refs in self.sources.values():
            for expert, ref in enumerate(refs):
                if ref.shape != refs[0].shape:
                    raise CheckpointError(f"{ref.name} of expert {expert} has shape {ref.shape}, not {refs[0].shape}.")
        rows = {pattern: refs[0].shape for pattern, refs in self.sources.items()}
        shapes = {pattern: (1, *shape[1:]) if self.fused else shape for pattern, shape in rows.items()}
        self._convert({pattern: torch.empty(shape, device="meta") for pattern, shape in shapes.items()}, 0)

    def _convert(self, tensors: dict[str, torch.Tensor], expert: int) -> torch.Tensor:
        tensor = self._converted(tensors)
        if tuple(tensor.shape) != (1, *self.shape[1:]):
            raise CheckpointError(
                f"{self.name}[{expert}] converts to shape {tuple(tensor.shape[1:])}, the model expects "
                f"{self.shape[1:]}. The configuration and the weights disagree; fetch the checkpoint again."
            )
        return tensor[0].contiguous()

    def _converted(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        collected: dict[str, Any] = {pattern: [tensor] for pattern, tensor in tensors.items()}
        converter = self.converter
        for operation in [] if converter is None else converter.operations:
            assert converter is not None
            collected = operation.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=self.name,
                model=_OneExpertShapes(self.shape),
                config=self.config,
                missing_keys=None,
            )
        (made,) = collected.values()
        return made[0] if isinstance(made, list) else made


def match_sources(
    model: PreTrainedModel, refs: Iterable[TensorRef], expert_params: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[dict[str, ParamSource], dict[str, TensorRef]]:
    """Split a checkpoint's tensors into sources of expert parameters and all others.

    Parameters
    ----------
    model : PreTrainedModel
        The model on the meta device: names, shapes and the family's conversion rules.
    refs : iterable of TensorRef
        All tensors of the checkpoint.
    expert_params : mapping of str to Tensor
        Full names of the stacked expert parameters, each ``[num_experts, ...]`` on the meta device.
    dtype : torch.dtype
        The model's dtype.

    Returns
    -------
    tuple
        Source of each expert parameter by its name, and the remaining tensors by their name on disk.

    Raises
    ------
    CheckpointError
        When an expert's tensors are missing.
    UnsupportedFamilyError
        When the family's conversion mixes experts.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    names = model.state_dict()
    collected: dict[str, dict[str, list[TensorRef]]] = {}
    others: dict[str, TensorRef] = {}
    # Natural order: the stock loader stacks experts in the order of their sorted names.
    for ref in sorted(refs, key=lambda item: dot_natural_key(item.name)):
        target, pattern = rename_source_key(ref.name, renamings, converters, model.base_model_prefix, names)
        if target not in names and ref.name in names:
            target, pattern = rename_source_key(ref.name, [], [], model.base_model_prefix, names)
        if target in expert_params:
            found = collected.setdefault(target, {})
            # Of a stacked tensor under several names the stock loader takes the first.
            if "" not in found:
                found.setdefault(pattern or "", []).append(ref)
        else:
            others[ref.name] = ref
    converter_of = {name: _converter(found, by_pattern) for name, found in collected.items()}
    for name in list(collected):
        for part, (found, converter) in _split_between_targets(name, collected[name], converter_of[name]).items():
            collected[part], converter_of[part] = found, converter
    missing = [name for name in expert_params if name not in collected]
    if missing:
        raise CheckpointError(
            f"the checkpoint has no tensors for {missing[0]} (and {len(missing) - 1} other expert parameters). It is "
            f"incomplete, or was saved by a version of the family that this transformers does not know."
        )
    sources = {
        name: _param_source(model, name, expert_params[name], collected[name], converter_of[name], dtype)
        for name in expert_params
    }
    return sources, others


def _converter(
    found: Mapping[str, list[TensorRef]], by_pattern: Mapping[str, WeightConverter]
) -> WeightConverter | None:
    """Return the converter whose source patterns matched a parameter's tensors; None if they are taken as they are."""
    pattern = next(iter(found))
    return by_pattern[pattern] if pattern else None


def _split_between_targets(
    name: str, found: dict[str, list[TensorRef]], converter: WeightConverter | None
) -> dict[str, tuple[dict[str, list[TensorRef]], WeightConverter]]:
    """Return each parameter's tensors and converter, where one list on disk holds the experts of several modules.

    Ernie 4.5 VL numbers its experts for text and for images through: the first half belongs to one experts module, the
    second to the other, and each is stacked and concatenated as usual. All other conversions have one target.
    """
    operations = [] if converter is None else converter.operations
    if converter is None or not (
        len(operations) == 1 and isinstance(operations[0], ErnieFuseAndSplitTextVisionExperts)
    ):
        return {}
    operation = operations[0]
    suffix = next(pattern for pattern in converter.target_patterns if name.endswith(pattern))
    parts = {}
    for place, target in enumerate(converter.target_patterns):
        chain: list[ConversionOps] = [MergeModulelist(operation.stack_dim)]
        if len(found) > 1:
            chain.append(Concatenate(operation.concat_dim))
        refs = {}
        for pattern, tensors in found.items():
            size = -(-len(tensors) // len(converter.target_patterns))
            refs[pattern] = tensors[place * size : (place + 1) * size]
        parts[name.removesuffix(suffix) + target] = refs, WeightConverter(converter.source_patterns, target, chain)
    return parts


def _param_source(
    model: PreTrainedModel,
    name: str,
    parameter: torch.Tensor,
    found: dict[str, list[TensorRef]],
    converter: WeightConverter | None,
    dtype: torch.dtype,
) -> ParamSource:
    shape = tuple(parameter.shape)
    num_experts = shape[0]
    patterns = set(found)
    operations = converter.operations if converter is not None else []
    merges = any(isinstance(operation, MergeModulelist) for operation in operations)
    if converter is not None:
        expected = set(converter.source_patterns)
        safe = len(converter.target_patterns) == 1 and all(_keeps_experts_apart(op) for op in operations)
        if not safe:
            raise UnsupportedFamilyError(
                f"model type {model.config.model_type!r}: {name} is made by {operations}, which emoe cannot do one "
                f"expert at a time. Models of this family run with stock transformers only."
            )
        if patterns != expected:
            raise CheckpointError(f"{name} needs tensors {sorted(expected)}, the checkpoint has {sorted(patterns)}.")
    if not merges:
        # Experts may be stacked along the first axis of their matrices (DBRX): the same bytes, with another shape.
        rows = (num_experts * shape[1], *shape[2:]) if len(shape) > 2 else None
        found = {
            pattern: [replace(ref, shape=shape) if ref.shape == rows else ref for ref in refs]
            for pattern, refs in found.items()
        }
    for pattern, refs in found.items():
        if merges and len(refs) != num_experts:
            raise CheckpointError(
                f"{name} needs {num_experts} tensors {pattern!r}, the checkpoint has {len(refs)}. It is incomplete."
            )
        if not merges and (len(refs) != 1 or not refs[0].shape or refs[0].shape[0] != num_experts):
            raise CheckpointError(
                f"{name} needs one tensor with {num_experts} experts, the checkpoint has "
                f"{[(ref.name, ref.shape) for ref in refs[:2]]}."
            )
    source = ParamSource(
        name=name,
        shape=shape,
        dtype=target_dtype(model, name, parameter, dtype),
        sources={pattern: tuple(refs) for pattern, refs in found.items()},
        converter=None if converter is None else deepcopy(converter),
        fused=not merges,
        config=model.config,
    )
    source.check_shapes()
    return source


def _keeps_experts_apart(operation: ConversionOps) -> bool:
    """Say whether an operation on the stacked layer acts on each expert alone (the expert axis is axis 0)."""
    if isinstance(operation, MergeModulelist):
        return operation.dim == 0
    if isinstance(operation, Concatenate | Chunk | Interleave):
        return operation.dim >= 1
    if isinstance(operation, Transpose):
        return min(operation.dim0, operation.dim1) >= 1
    return False


def target_dtype(model: PreTrainedModel, name: str, parameter: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype stock loading gives a parameter or stored buffer, the family's float32 exceptions included."""
    plan = model._get_dtype_plan(dtype)
    if plan:
        pattern, group_names, _ = build_glob_alternation(list(plan))
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            return plan[group_names[match.lastgroup]]
    return parameter.dtype
