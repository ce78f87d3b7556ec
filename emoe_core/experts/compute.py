"""Computing a layer's experts from slots, each as soon as its weights are there.

A family's eager code visits experts in ascending order, so one that is still being read holds up those behind it, and
it finds each expert's tokens anew. Here tokens are grouped once, resident experts are computed while absent ones are
read, and results are added in ascending order of expert id: the order of eager's additions, hence the same bits.

transformers describes an experts module by flags (``has_gate``, ``is_transposed``, ``has_bias``,
``has_post_expert_norm``) and gives it ``_apply_gate``; that is what is followed here. Whether it is what the family's
own code does is not assumed: `find_form` computes a few tokens both ways, in the engine's own slots (eager's way, on a
device with allocations of its own, in fresh copies), and only a form whose results are equal bit for bit is used
(experts in 8 bits: equal within rounding, for their products are not eager's). A family without one keeps its eager
code, and the `FoundForm` says why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from emoe_core.checkpoint.quantization import LARGEST, SCALE, product
from emoe_core.errors import is_out_of_memory

Tensors = Mapping[str, torch.Tensor]


class LeasedExperts(Protocol):
    """Experts that stay in their slots for one pass of a layer; see `lease.Lease`."""

    order: tuple[int, ...]

    def __getitem__(self, expert: int) -> Tensors: ...

    def take(self, lowest: bool = False) -> tuple[int, Tensors] | None:
        """Return an expert not taken yet with its tensors, the lowest one or any; None after the last."""


Eager = Callable[[LeasedExperts, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# When results that wait for their turn to be added take this much, the next expert in order is waited for.
WAITING_BYTES = 16 << 20
_PROBES = ((1, 2), (1, 1), (5, 2))
_PERIOD = 65521
# Between products of 8-bit experts and of the same experts restored, as a share of the largest value.
ROUNDING = 0.03


class ExpertForm:
    """How an experts module computes one expert.

    Parameters
    ----------
    module : torch.nn.Module
        The experts module, for its flags, activation and norm.
    fused_bias : bool
        Whether a bias goes into the product or is added to what it gives; they round differently.
    """

    def __init__(self, module: Any, fused_bias: bool) -> None:
        self._module = module
        self._fused_bias = fused_bias
        self._transposed = bool(module.is_transposed)
        self._gated = bool(module.has_gate)
        self._bias = bool(module.has_bias)
        self._norm = bool(getattr(module, "has_post_expert_norm", False))
        self._up = "gate_up_proj" if self._gated else "up_proj"

    def for_module(self, module: Any) -> ExpertForm:
        """Return the same form for another experts module of the same class."""
        return ExpertForm(module, self._fused_bias)

    def expert(self, tensors: Tensors, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute one expert on its tokens: hidden [n, H], router weights [n, 1] -> weighted results [n, H]."""
        states = self._product(hidden, tensors, self._up)
        states = self._module._apply_gate(states) if self._gated else self._module.act_fn(states)
        states = self._product(states, tensors, "down_proj")
        if self._norm:
            states = self._module.post_expert_norm(states)
        return states * weights

    def layer(
        self,
        lease: LeasedExperts,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        on_host: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute a layer from leased experts.

        Parameters
        ----------
        lease : LeasedExperts
            Experts that are computed; places of ``index`` that name another one (padding) give nothing.
        hidden : torch.Tensor
            [T, H].
        index, weights : torch.Tensor
            [T, k].
        on_host : torch.Tensor or None
            The index on the host, where it is known there: the device is not waited for then.

        Returns
        -------
        torch.Tensor
            [T, H].
        """
        total = torch.zeros_like(hidden)
        on_host = index.cpu() if on_host is None else on_host
        groups = _one_token(on_host) if index.shape[0] == 1 else None
        if groups is None:
            groups = _group(index, on_host)
        results: dict[int, torch.Tensor] = {}
        order, waiting = deque(lease.order), 0
        while (taken := lease.take(lowest=waiting > WAITING_BYTES)) is not None:
            expert, tensors = taken
            if expert in groups:
                places, rows = groups[expert]
                if rows is None:
                    # Eager copies its rows to fresh memory, and some products round by how operands are aligned.
                    row = hidden if hidden.data_ptr() % 64 == 0 else hidden.clone()
                    result = self.expert(tensors, row, weights[:, places])
                else:
                    result = self.expert(tensors, hidden[rows], weights[rows, places, None])
                results[expert] = result
                waiting += result.nbytes
            while order and (order[0] in results or order[0] not in groups):
                ready = results.pop(order[0], None)
                if ready is not None:
                    waiting -= ready.nbytes
                    rows = groups[order[0]][1]
                    part = ready.to(total.dtype)
                    total = total.add_(part) if rows is None else total.index_add_(0, rows, part)
                order.popleft()
        return total

    def _product(self, states: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
        weight, scale = tensors[name], tensors.get(name + SCALE)
        if scale is not None:
            result = product(states, weight, scale)
            return result + tensors[f"{name}_bias"] if self._bias else result
        if not self._bias:
            return states @ weight if self._transposed else linear(states, weight)
        bias = tensors[f"{name}_bias"]
        if self._fused_bias:
            return torch.addmm(bias, states, weight) if self._transposed else linear(states, weight, bias)
        return (states @ weight if self._transposed else linear(states, weight)) + bias


@dataclass(frozen=True)
class FoundForm:
    """The form that computes what a family's eager code computes, or None and why there is none."""

    form: ExpertForm | None
    failure: str = ""


def find_form(
    module: Any, eager: Eager, samples: Sequence[Tensors], num_experts: int, fresh: bool = False
) -> FoundForm:
    """Look for the form that computes what a family's eager code computes, bit for bit.

    Parameters
    ----------
    module : torch.nn.Module
        The experts module.
    eager : callable
        (lease, hidden [T, H], index [T, k], weights [T, k]) -> result [T, H]; the family's own code.
    samples : sequence of mapping
        Parameters of two experts, in the memory that will hold real ones; they are overwritten.
    num_experts : int
        E, at least 2.
    fresh : bool
        Let eager's code compute from copies in memory of their own.

    Raises
    ------
    MemoryError, RuntimeError
        When memory runs out.
    """
    if num_experts < 2 or not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        return FoundForm(None, "one expert only" if num_experts < 2 else "its experts module has no description")
    for seed, tensors in enumerate(samples):
        for name in sorted(tensors):
            _fill(tensors[name], seed)
    ids = (0, num_experts - 1)
    weights_of = dict(zip(ids, samples, strict=True))
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in samples] if fresh else samples
    eager_of = dict(zip(ids, copies, strict=True))
    device = next(iter(samples[0].values())).device
    down = samples[0].get("down_proj")
    # Rows share a scale, so products of integers need the outputs in rows.
    if down is None or (down.dtype == torch.int8 and module.is_transposed):
        return FoundForm(None, "no down projection" if down is None else "8 bits in columns")
    width = down.shape[1 if module.is_transposed else 0]
    dtype = samples[0]["down_proj" + SCALE].dtype if down.dtype == torch.int8 else down.dtype
    failure = "its results differ from eager's"
    for fused in (True, False) if module.has_bias else (True,):
        form = ExpertForm(module, fused)
        try:
            probes = ((form, eager, weights_of, eager_of, tokens, k, width, dtype, device) for tokens, k in _PROBES)
            if all(matches_eager(*probe) for probe in probes):
                return FoundForm(form)
        except (KeyError, RuntimeError, AttributeError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            failure = f"{type(error).__name__}: {error}"
    return FoundForm(None, failure)


def matches_eager(
    form: ExpertForm,
    eager: Eager,
    weights_of: Mapping[int, Tensors],
    eager_of: Mapping[int, Tensors],
    tokens: int,
    k: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Compare a form on some weights with eager code on the same ones, or on copies of them, on some tokens."""
    exact = all(tensor.is_floating_point() for tensor in next(iter(weights_of.values())).values())
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.tensor(sorted(weights_of))
    order = torch.stack([torch.randperm(len(ids), generator=generator)[:k] for _ in range(tokens)])
    index = ids[order].to(device)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    for weight_dtype in {dtype, torch.float32}:
        weights = torch.rand(tokens, k, generator=generator).to(device, weight_dtype)
        with torch.no_grad():
            active = sorted(set(index.flatten().tolist()))
            expected = eager(_Resident(eager_of, active), hidden, index, weights)
            got = form.layer(_Resident(weights_of, active), hidden, index, weights)
        if not bool(expected.isfinite().all()) or not _same(expected, got, exact):
            return False
    return True


Group = tuple[Any, torch.Tensor | None]


def _one_token(on_host: torch.Tensor) -> dict[int, Group] | None:
    """Return, per expert of an index [1, k], its place (a slice) and None for rows; None where one comes twice."""
    chosen = on_host[0].tolist()
    groups: dict[int, Group] = {expert: (slice(place, place + 1), None) for place, expert in enumerate(chosen)}
    return groups if len(groups) == len(chosen) else None


def _group(index: torch.Tensor, on_host: torch.Tensor) -> dict[int, Group]:
    """Return, per expert of an index [T, k], the places and tokens that chose it, in eager's order: by place, token."""
    tokens = index.shape[0]
    flat = index.t().reshape(-1)
    order = flat.argsort(stable=True)
    place, token = order // tokens, order % tokens
    start = 0
    groups: dict[int, Group] = {}
    for expert, count in enumerate(torch.bincount(on_host.flatten()).tolist()):
        if count:
            groups[expert] = (place[start : start + count], token[start : start + count])
            start += count
    return groups


def _same(expected: torch.Tensor, got: torch.Tensor, exact: bool) -> bool:
    if exact:
        return torch.equal(expected, got)
    return bool((got - expected).abs().max() <= ROUNDING * expected.abs().max())


def _fill(tensor: torch.Tensor, seed: int) -> None:
    """Fill a parameter of any size with numbers that repeat after a prime count, at the speed of a copy."""
    block = torch.randn(_PERIOD, generator=torch.Generator().manual_seed(seed))
    block = (30 * block).clamp(-LARGEST, LARGEST) if tensor.dtype == torch.int8 else 0.05 * block
    block = block.to(tensor.device, tensor.dtype)
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), _PERIOD):
        part = flat[start : start + _PERIOD]
        part.copy_(block[: part.numel()])


class _Resident:
    """A lease on experts that are all there."""

    def __init__(self, tensors: Mapping[int, Tensors], order: Sequence[int]) -> None:
        self.order = tuple(order)
        self._left = list(order)
        self._tensors = tensors

    def __getitem__(self, expert: int) -> Tensors:
        return self._tensors[expert]

    def take(self, lowest: bool = False) -> tuple[int, Tensors] | None:
        """Return the last one first: their order must not matter."""
        if not self._left:
            return None
        expert = self._left.pop()
        return expert, self._tensors[expert]
