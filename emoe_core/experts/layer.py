"""One MoE layer served from slots: what was wanted, what is missing, what replaces it, and the result.

The experts function (`dispatch.py`) asks the `LayerHandle` that hangs on a module. It computes in a form that was found
equal to the family's eager code bit for bit (`compute.py`) or, where none is, by that eager code itself (`eager.py`):
bit-identical to stock ``experts_implementation="eager"`` as long as nobody is rerouted.

What happens on a miss is decided per token, by the miss tolerance of its (task, layer): see `rerouting.py`.
Padding rows are computed where their experts are there anyway, but never cause a load, a count or a history entry.
Their values may therefore differ from stock's, and with them the number of rows per matrix in later layers: a padded
batch agrees with stock within rounding on its real rows, an unpadded one bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from emoe_core.errors import IntegrationError, UnsupportedFamilyError
from emoe_core.experts import trace
from emoe_core.experts.compute import LeasedExperts
from emoe_core.experts.dispatch import attached_to
from emoe_core.experts.rerouting import DROP, Rerouted, reroute
from emoe_core.experts.router import WatchedRouter
from emoe_core.experts.routing_rules import Choice
from emoe_core.experts.step import StepContext
from emoe_core.experts.trace import TraceRecorder
from emoe_core.loader.loader import ExpertLoader

INFERENCE_ONLY = (
    "emoe serves inference only: expert slots are overwritten, so gradients would be wrong. Run under torch.no_grad(), "
    "or fine-tune the stock model."
)


class Session(Protocol):
    """What a layer needs of its engine."""

    step: StepContext | None
    recorder: TraceRecorder | None
    on_miss: str
    cache_bias: float

    def tolerances(self, layer: int, step: StepContext | None) -> list[float]:
        """Miss tolerance in [0, 1] of each row of a pass at a layer; one for all where they are nobody's."""

    def observe(self, layer: int, chosen: torch.Tensor, demand: Sequence[int], step: StepContext | None) -> None:
        """Take the desired experts int64 [tokens, k] of one layer, and their counts [E], for the requests' history."""


class Form(Protocol):
    """How a layer is computed from leased experts; see `compute.ExpertForm` and `eager.EagerForm`."""

    def layer(
        self,
        lease: LeasedExperts,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        on_host: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute hidden [T, H], index and weights [T, k] -> [T, H]; ``on_host`` is the index where nobody waits."""


class LayerHandle:
    """One MoE layer of one engine, and the router logits of the call in progress.

    Parameters
    ----------
    layer : int
    loader : ExpertLoader
    session : Session
    form : Form
    router : WatchedRouter or None
        Keeps its logits for this layer from now on; None where no routing rule explains it.
    reads_text : bool
        False: a layer for images or sound, whose rows are not those of the pass over text.
    """

    def __init__(
        self,
        layer: int,
        loader: ExpertLoader,
        session: Session,
        form: Form,
        router: WatchedRouter | None,
        reads_text: bool,
    ) -> None:
        self.layer = layer
        self.num_experts = loader.layers[layer].num_experts
        self.form = form
        self.router = None if router is None else router.router
        # Who replaces whom is decided on the host, whatever device computes.
        self.rule = None if router is None else router.rule.on_host()
        self.router_logits: torch.Tensor | None = None
        self._loader = loader
        self._session = session
        self._reads_text = reads_text
        if router is not None:
            router.router.register_forward_hook(self._keeper(router))

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the layer: hidden [T, H], index and weights [T, k] -> [T, H]."""
        if hidden.requires_grad and torch.is_grad_enabled():
            raise IntegrationError(INFERENCE_ONLY)
        step, device = self._step(index.shape[0]), self._loader.device
        logits, self.router_logits = self.router_logits, None

        # 1. Wanted: the router's choices for real tokens. They are what history learns from, whatever is served.
        #    Here, and only here, the device is waited for: with what is asked of it, all is decided on the host.
        rows = self._session.tolerances(self.layer, step)
        lossy = any(tolerance > 0 for tolerance in rows)
        asked = [weights] if lossy or self._session.recorder is not None else []
        dropping = self._session.on_miss == DROP
        asked += [logits] if lossy and logits is not None and not dropping else []
        chosen, *scores = device.to_host(index, *asked)
        real = None if step is None else step.real
        wanted = chosen if real is None else chosen[real]
        demand = _demand(wanted, self.num_experts)
        active = [expert for expert, tokens in enumerate(demand) if tokens]

        # 2. Missing: wanted, and in no slot.
        self._loader.table.begin(self.layer, demand)
        resident = self._loader.table.resident(self.layer)
        absent = [expert for expert in active if expert not in resident]

        # 3. Replace or drop: choices that are missing, as far as their tokens' tolerances go.
        rerouted = None
        if absent and lossy:
            rerouted = self._reroute(rows, chosen, scores, absent, demand, resident, real)
        served, needed = chosen, active
        if rerouted is not None:
            served = rerouted.index
            index, weights = device.to_device(rerouted.index), device.to_device(rerouted.weights)
            needed = _distinct(served if real is None else served[real])

        # What history, counters and the trace are told.
        self._session.observe(self.layer, wanted, demand, step)
        self._count(wanted, demand, active, absent, rerouted, real)
        if self._session.recorder is not None:
            replaced = None if rerouted is None else rerouted.replaced
            became = trace.DROP if dropping else trace.REROUTE
            self._session.recorder.layer(self.layer, chosen, scores[0], served, absent, replaced, became)

        # 4. Lease: experts that are needed stay until they are computed; what is missing still is read meanwhile.
        with self._loader.lease(self.layer, needed or [int(chosen.flatten()[0])]) as lease:
            # 5. Compute.
            return self.form.layer(lease, hidden, index, weights, served)

    def _keeper(self, router: WatchedRouter) -> Any:
        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.router_logits = router.logits(output)

        return keep

    def _step(self, rows: int) -> StepContext | None:
        """Return the context of the pass in progress, or None where a layer's rows are not those of the pass."""
        step = self._session.step
        if step is None or step.tokens == rows:
            return step
        if self._reads_text:
            raise IntegrationError(
                f"MoE layer {self.layer} was asked for {rows} rows in a pass over {step.tokens} tokens: whose they are "
                f"is unknown. Call the whole model, with input_ids or inputs_embeds of all tokens"
            )
        return None

    def _reroute(
        self,
        rows: list[float],
        index: torch.Tensor,
        scores: list[torch.Tensor],
        absent: list[int],
        demand: list[int],
        resident: set[int],
        real: torch.Tensor | None,
    ) -> Rerouted | None:
        """Give choices up as far as the rows' tolerances go; all on the host, ``scores`` being weights and logits."""
        dropping = self._session.on_miss == DROP
        if not dropping and (self.rule is None or len(scores) < 2):
            raise UnsupportedFamilyError(
                f"MoE layer {self.layer} of this family has a router that no known routing rule explains, so tokens "
                f'cannot be rerouted: load with tolerance=0 (exact) or on_miss="drop".'
            )
        # While a layer still has empty slots, filling them is better than replacing: load the most wanted first.
        room = self._loader.table.room(self.layer)
        filling = sorted(absent, key=lambda expert: -demand[expert])[:room]
        # Dropping never looks at logits: the weights stand in for them.
        choice, present = Choice(scores[-1], scores[0], index), resident.union(filling)
        rule = None if dropping else self.rule
        return reroute(choice, present, self.num_experts, rows, rule, self._session.cache_bias, real)

    def _count(
        self,
        wanted: torch.Tensor,
        demand: list[int],
        active: list[int],
        absent: list[int],
        rerouted: Rerouted | None,
        real: torch.Tensor | None,
    ) -> None:
        """Count the layer's hits, reroutes or drops, and its tokens; the lease counts each load where it starts."""
        counters = self._loader.counters
        counters.token_lookups += wanted.numel()
        missed_tokens = sum(demand[expert] for expert in absent)
        counters.token_hits += wanted.numel() - missed_tokens
        replaced_tokens, replaced = 0, dict[int, int]()
        if rerouted is not None:
            marks = rerouted.replaced if real is None else rerouted.replaced[real]
            replaced_tokens = int(marks.sum())
            lost = torch.bincount(wanted[marks], minlength=self.num_experts).tolist()
            replaced = {expert: lost[expert] for expert in absent}
        counters.token_loads += missed_tokens - replaced_tokens
        given_up = sum(1 for expert in absent if replaced.get(expert, 0) == demand[expert])
        hits = len(active) - len(absent)
        counters.hits += hits
        counters.lookups += hits + given_up
        if self._session.on_miss == DROP:
            counters.drops += given_up
            counters.token_drops += replaced_tokens
        else:
            counters.reroutes += given_up
            counters.token_reroutes += replaced_tokens


def _demand(index: torch.Tensor, num_experts: int) -> list[int]:
    """Count how often each expert occurs in an index; for one token, without a call to torch but one."""
    if index.shape[0] != 1:
        return torch.bincount(index.flatten(), minlength=num_experts).tolist()
    counts = [0] * num_experts
    for expert in index[0].tolist():
        counts[expert] += 1
    return counts


def _distinct(index: torch.Tensor) -> list[int]:
    return sorted(set(index.flatten().tolist()))


def handle_of(module: torch.nn.Module) -> LayerHandle | None:
    """Return the layer of an engine that an experts module is tied to."""
    layer = attached_to(module)
    return layer if isinstance(layer, LayerHandle) else None


def router_of(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the router of an attached experts module, or None when no routing rule explains it."""
    handle = handle_of(module)
    return None if handle is None else handle.router
