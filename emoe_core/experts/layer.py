"""The "emoe" experts function: transformers asks it to compute a layer's experts, it computes them from slots.

transformers dispatches every decorated experts module through ``ALL_EXPERTS_FUNCTIONS``. We register one function
under the name "emoe". It finds the layer's `LayerHandle` on the module itself (state hangs on modules, never on
globals) and computes in a form that was proven equal to the family's eager code bit for bit (`compute.py`), or,
where none is, runs that eager code itself over an object that answers ``gate_up_proj[expert]`` and its siblings with
slot tensors. Same products, same shapes, same order of accumulation: bit-identical to stock
``experts_implementation="eager"`` as long as nobody is rerouted.

What happens on a miss is decided here, per token, by the miss tolerance of its (task, layer): see `rerouting.py`.
Padding rows are computed where their experts are there anyway, but never cause a load, a count or a history entry.
Their values may therefore differ from stock's, and with them the number of rows per matrix in later layers: a padded
batch agrees with stock within rounding on its real rows, an unpadded one bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from emoe_core.checkpoint.adapters import Eager, adapter_of
from emoe_core.checkpoint.quantization import parameter
from emoe_core.errors import IntegrationError, UnsupportedFamilyError
from emoe_core.experts.compute import Borrowed, ExpertForm
from emoe_core.experts.reroute_token import reroute_token
from emoe_core.experts.rerouting import Rerouted, outbid, replaceable, substitute
from emoe_core.experts.router import Call, WatchedRouter
from emoe_core.experts.routing_rules import Choice, RoutingRule
from emoe_core.experts.step import StepContext
from emoe_core.experts.trace import TraceRecorder
from emoe_core.loader.loader import ExpertLoader
from emoe_core.loader.prefetch import Lookahead

IMPLEMENTATION = "emoe"
INFERENCE_ONLY = (
    "emoe serves inference only: expert slots are overwritten, so gradients would be wrong. Run under torch.no_grad(), "
    "or fine-tune the stock model."
)
_ATTRIBUTE = "_emoe_layer"


class Session(Protocol):
    """What a layer needs of its engine."""

    step: StepContext | None
    recorder: TraceRecorder | None
    cache_bias: float

    def tolerances(self, layer: int, step: StepContext | None) -> list[float]:
        """Miss tolerance in [0, 1] of each row of a pass at a layer; one for all where they are nobody's."""

    def observe(self, layer: int, chosen: torch.Tensor, demand: Sequence[int], step: StepContext | None) -> None:
        """Take the desired experts int64 [tokens, k] of one layer, and their counts [E], for the requests' history."""


class LayerHandle:
    """One MoE layer of one engine: its number, its router's rule, and the router logits of the call in progress."""

    def __init__(
        self,
        layer: int,
        module: torch.nn.Module,
        loader: ExpertLoader,
        session: Session,
    ) -> None:
        self.layer = layer
        self.loader = loader
        self.session = session
        self.num_experts = loader.layers[layer].num_experts
        self.params = frozenset(param.name for param in loader.layers[layer].params)
        # False: a layer for images or sound, whose rows are not those of the pass over text.
        self.reads_text = False
        self.rule: RoutingRule | None = None
        self.router: torch.nn.Module | None = None
        self.router_logits: torch.Tensor | None = None
        self.choose: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.lookahead: Lookahead | None = None
        self.form: ExpertForm | None = None
        self.watch: Call | None = None
        self._eager = eager_of(module)

    def attach_router(self, found: WatchedRouter) -> None:
        """Keep the router's logits for this layer from now on."""
        self.rule, self.router, self.choose = found.rule, found.router, found.choose

        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.router_logits = found.logits(output)

        found.router.register_forward_hook(keep)

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the layer: hidden [T, H], index and weights [T, k] -> [T, H]."""
        if self.watch is not None:
            self.watch(hidden, index, weights)
            return torch.zeros_like(hidden)
        if hidden.requires_grad and torch.is_grad_enabled():
            raise IntegrationError(INFERENCE_ONLY)
        step = self.session.step
        if step is not None and step.tokens != index.shape[0]:
            if self.reads_text:
                raise IntegrationError(
                    f"MoE layer {self.layer} was asked for {index.shape[0]} rows in a pass over {step.tokens} tokens: "
                    f"whose they are is unknown. Call the whole model, with input_ids or inputs_embeds of all tokens"
                )
            step = None
        logits, self.router_logits = self.router_logits, None
        real = None if step is None or step.real is None else step.real.to(index.device)
        wanted = index if real is None else index[real]
        demand = _demand(wanted, self.num_experts)
        active = [expert for expert, tokens in enumerate(demand) if tokens]
        self.loader.table.begin(self.layer, demand)
        resident = self.loader.table.resident(self.layer)
        absent = [expert for expert in active if expert not in resident]
        rerouted = None
        if absent:
            rerouted = self._reroute(logits, index, weights, absent, demand, resident, step, real)
        self.session.observe(self.layer, wanted, demand, step)
        served_index, served_weights = (index, weights) if rerouted is None else (rerouted.index, rerouted.weights)
        if rerouted is not None:
            kept = served_index if real is None else served_index[real]
            computed = sorted(set(kept.flatten().tolist()))
        else:
            computed = active
        self._count(wanted, demand, active, absent, rerouted, real)
        if self.session.recorder is not None:
            replaced = None if rerouted is None else rerouted.replaced
            self.session.recorder.layer(self.layer, index, weights, served_index, absent, replaced)
        with self.loader.lease(self.layer, computed or [int(index.flatten()[0])]) as lease:
            if self.lookahead is not None:
                # What this layer lacks was asked for just now and is read first.
                self.lookahead.score(self.layer, active)
                self.lookahead.guess(self.layer, hidden, real)
            if self.form is not None:
                return self.form.layer(lease, hidden, served_index, served_weights)
            return self.eager(module, lease, hidden, served_index, served_weights)

    def eager(
        self, module: torch.nn.Module, lease: Borrowed, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the family's own code with borrowed experts in the place of its parameters."""
        result: torch.Tensor = self._eager(_ExpertsView(module, self.params, lease), hidden, index, weights)
        return result

    def _reroute(
        self,
        logits: torch.Tensor | None,
        index: torch.Tensor,
        weights: torch.Tensor,
        absent: list[int],
        demand: list[int],
        resident: set[int],
        step: StepContext | None,
        real: torch.Tensor | None,
    ) -> Rerouted | None:
        rows = self.session.tolerances(self.layer, step)
        if not any(tolerance > 0 for tolerance in rows):
            return None
        if self.rule is None or logits is None:
            raise UnsupportedFamilyError(
                f"MoE layer {self.layer} of this family has a router that no known routing rule explains, so tokens "
                f"cannot be rerouted: load with tolerance=0 (exact)."
            )
        # While a layer still has empty slots, filling them is better than replacing: load the most wanted first.
        room = self.loader.table.room(self.layer)
        filling = sorted(absent, key=lambda expert: -demand[expert])[:room]
        choice = Choice(logits, weights, index)
        if index.shape[0] == 1 and self.rule.groups is None and self.session.cache_bias == 0:
            return reroute_token(choice, {*resident, *filling}, rows[0], self.rule)
        tolerance = torch.tensor(rows).repeat_interleave(index.shape[0] // len(rows))
        present = torch.zeros(self.num_experts, dtype=torch.bool, device=index.device)
        present[sorted(resident) + filling] = True
        missing = ~present[index]
        if real is not None:
            missing &= real.unsqueeze(-1)
        candidates = missing
        if self.session.cache_bias > 0:
            candidates = missing & outbid(choice, present, self.session.cache_bias, self.rule)
        replace = replaceable(weights, candidates, tolerance.to(index.device))
        present[index[missing & ~replace]] = True
        # What is loaded for one token serves every other that chose it.
        replace &= ~present[index]
        if not bool(replace.any()):
            return None
        return substitute(choice, replace, present, self.rule)

    def _count(
        self,
        wanted: torch.Tensor,
        demand: list[int],
        active: list[int],
        absent: list[int],
        rerouted: Rerouted | None,
        real: torch.Tensor | None,
    ) -> None:
        """Count the layer's hits and reroutes, and its tokens; the lease counts each load where it starts."""
        counters = self.loader.counters
        counters.token_requests += wanted.numel()
        missed_tokens = sum(demand[expert] for expert in absent)
        counters.token_hits += wanted.numel() - missed_tokens
        replaced_tokens, replaced = 0, dict[int, int]()
        if rerouted is not None:
            marks = rerouted.replaced if real is None else rerouted.replaced[real]
            replaced_tokens = int(marks.sum())
            lost = torch.bincount(wanted[marks], minlength=self.num_experts).tolist()
            replaced = {expert: lost[expert] for expert in absent}
        counters.token_reroutes += replaced_tokens
        counters.token_loads += missed_tokens - replaced_tokens
        reroutes = sum(1 for expert in absent if replaced.get(expert, 0) == demand[expert])
        hits = len(active) - len(absent)
        counters.hits += hits
        counters.reroutes += reroutes
        counters.requests += hits + reroutes


def _demand(index: torch.Tensor, num_experts: int) -> list[int]:
    """Count how often each expert occurs in an index; for one token, without a call to torch but one."""
    if index.shape[0] != 1:
        return torch.bincount(index.flatten(), minlength=num_experts).tolist()
    counts = [0] * num_experts
    for expert in index[0].tolist():
        counts[expert] += 1
    return counts


def eager_of(module: torch.nn.Module) -> Eager:
    """Return the arithmetic of an experts module's class, to be run over a view whose weights come from slots."""
    adapter = adapter_of(module)
    if adapter is None:
        return type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return adapter.eager or type(module).forward


class _ExpertsView:
    """Stands in for the experts module inside its eager code: weights come from slots, all else from the module."""

    def __init__(self, module: torch.nn.Module, params: frozenset[str], lease: Borrowed) -> None:
        self._module = module
        self._params = params
        self._lease = lease

    def __getattr__(self, name: str) -> Any:
        if name in self._params:
            return _ParamView(self._lease, name)
        return getattr(self._module, name)


class _ParamView:
    """``weights[expert]`` answered from a slot."""

    def __init__(self, lease: Borrowed, name: str) -> None:
        self._lease = lease
        self._name = name

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return parameter(self._lease[int(expert)], self._name)


def emoe_experts_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Serve one call of an experts module; the function that is registered with transformers."""
    handle: LayerHandle | None = module.__dict__.get(_ATTRIBUTE)
    if handle is None:
        raise IntegrationError(
            f"a {type(module).__name__} was asked to run as 'emoe' but belongs to no engine: load the model with "
            f"emoe_core.load(), or choose another experts_implementation for this model."
        )
    return handle.forward(module, hidden_states, top_k_index, top_k_weights)


def attach(module: torch.nn.Module, handle: LayerHandle) -> None:
    """Tie an experts module to its engine's layer."""
    module.__dict__[_ATTRIBUTE] = handle


def detach(module: torch.nn.Module) -> None:
    """Untie an experts module; a later call then raises IntegrationError instead of reading freed slots."""
    module.__dict__.pop(_ATTRIBUTE, None)


def handle_of(module: torch.nn.Module) -> LayerHandle:
    """Return the layer that an attached experts module is tied to."""
    handle: LayerHandle = module.__dict__[_ATTRIBUTE]
    return handle


def router_of(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the router of an attached experts module, or None when no routing rule explains it."""
    return handle_of(module).router if _ATTRIBUTE in module.__dict__ else None


def register() -> None:
    """Make "emoe" known to transformers. Idempotent; the only global state of this package."""
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, emoe_experts_forward)
