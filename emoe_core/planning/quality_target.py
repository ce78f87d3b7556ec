"""From a quality target to slots per layer and a miss tolerance per (task, layer).

A target says by how much perplexity may rise: 0.01 allows a ratio of 1.01 to the all-resident model. The loss of a task
is modelled from its profile as

    loss(task, slots) = scale * sum over rerouting layers l of  KL_l * (1 - covered_l(slots_l))      [nats per token]

with KL_l the divergence when layer l alone is routed at random, covered_l(s) the share of routed choices that the
task's s most frequent experts cover on prompts they were not counted on, and ``scale`` measured: routing to the next
best resident expert is milder than random routing, and layers are not independent. `choose` spends memory where it
buys most (no budget given), or finds the layers that must stay exact, that is, load what is absent (budget given).

The model of the loss is rough, and a profile is a sample: a target is aimed at, not guaranteed. What a choice really
costs is for held-out prompts to say; `workbench.quality.experiment` measures it beside the prediction. Measured so far
(embedded model, 48 uniform test prompts, 32 tokens, float32, seed 0, scale from 4 of 8 slots): without a budget,
targets of 0.5, 1 and 5% took 49, 37 and 25% of the experts and cost 0.73% (0.25 to 1.22), 2.16% (1.39 to 2.99) and
4.70% (3.33 to 6.16), so the two strict ones were missed: below the slots where the scale was measured, loss grows
faster than the model says. With 50% of expert memory given, all three were kept (0.22, 0.31 and 0.31%). A target of 0
is exact everywhere. Tasks without a profile, "unknown" among them, are exact too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from emoe_core.budget import Budget, SlotPlan, plan_given, plan_slots
from emoe_core.checkpoint.index import CheckpointIndex
from emoe_core.errors import OptionError
from emoe_core.planning.tasks import Profile, ProfileError, TaskProfile


@dataclass(frozen=True)
class QualityPlan:
    """What a quality target comes to.

    Attributes
    ----------
    max_quality_loss : float
        The target: allowed rise of perplexity, 0.01 for 1%.
    slots_per_layer : tuple of int
    exact : mapping
        Per task, the MoE layers that must not reroute; a task without an entry is exact everywhere.
    predicted_loss : mapping
        Per task, the predicted rise of perplexity, 0.01 for 1%.
    """

    max_quality_loss: float
    slots_per_layer: tuple[int, ...]
    exact: Mapping[str, frozenset[int]]
    predicted_loss: Mapping[str, float]

    def tolerance(self, task: str, layer: int) -> float:
        """Return the miss tolerance: 0 where a (task, layer) must load what is absent, else 1."""
        layers = self.exact.get(task)
        return 0.0 if layers is None or layer in layers else 1.0

    def rows(self) -> list[tuple[str, str]]:
        """Return (term, value) rows for people."""
        tasks = [
            (task, f"predicted rise {rise:.2%}, exact in {len(self.exact[task])} of {len(self.slots_per_layer)} layers")
            for task, rise in sorted(self.predicted_loss.items())
        ]
        return [("quality target", f"perplexity up by at most {self.max_quality_loss:.2%}"), *tasks]


def choose(
    profile: Profile,
    max_quality_loss: float,
    num_experts: Sequence[int],
    top_k: int,
    slots: Sequence[int] | None = None,
) -> QualityPlan:
    """Choose the least memory, or the fewest exact layers, that the profile predicts to keep the target for every task.

    Parameters
    ----------
    profile : Profile
        With coverage, divergences and a loss scale for each task.
    max_quality_loss : float
        Allowed rise of perplexity, 0 or more.
    num_experts : sequence of int
        Experts of each MoE layer.
    top_k : int
        Experts a token uses: no layer is given fewer slots, since what fewer cost was not measured.
    slots : sequence of int, optional
        Slots of each layer, where the budget is given; the layers that then cost most are made exact.

    Raises
    ------
    OptionError
        When the target is below 0 or no number.
    ProfileError
        When the profile lacks what the model of the loss needs; the message says how to measure it.
    """
    if not (math.isfinite(max_quality_loss) and max_quality_loss >= 0):
        raise OptionError(f"max_quality_loss is {max_quality_loss}: give 0 (exact) or more, such as 0.01 for 1%")
    if not profile.tasks or profile.n_layers != len(num_experts):
        raise ProfileError(
            f"the profile covers {len(profile.tasks)} tasks and {profile.n_layers} MoE layers, the model has "
            f"{len(num_experts)}: measure it again with `emoe model profile`."
        )
    allowed_nats = math.log1p(max_quality_loss)
    losses = {name: _layer_losses(task, num_experts) for name, task in profile.tasks.items()}
    if slots is None:
        slots = _cheapest_slots(list(losses.values()), num_experts, top_k, allowed_nats)
    exact, predicted = {}, {}
    for name, table in losses.items():
        per_layer = np.array([table[layer][count] for layer, count in enumerate(slots)])
        # "Exact" must not rest on a divergence that was measured as 0.
        kept = _within(per_layer, allowed_nats) if max_quality_loss > 0 else frozenset()
        exact[name] = frozenset(range(len(num_experts))) - kept
        predicted[name] = math.expm1(float(sum(per_layer[layer] for layer in kept)))
    return QualityPlan(max_quality_loss, tuple(slots), exact, predicted)


def plan_memory(
    index: CheckpointIndex, budget: Budget | str | int | float | None, profile: Profile | None, target: float | None
) -> tuple[SlotPlan, QualityPlan | None]:
    """Return the slots that a budget and a quality target come to, and what the target, if any, allows.

    Parameters
    ----------
    index : CheckpointIndex
    budget : Budget, str, int, float or None
        None: as few slots as the target allows; all experts without one.
    profile : Profile or None
        Must be the model's own.
    target : float or None
        Allowed rise of perplexity; needs a profile.

    Raises
    ------
    BudgetError, ProfileError, OptionError
        As `emoe_core.load`.
    """
    if profile is not None:
        profile.require_model(index.source_hash)
    if profile is None or target is None:
        return plan_slots(index, "100%" if budget is None else budget), None
    given = None if budget is None else plan_slots(index, budget)
    experts = [layer.num_experts for layer in index.layers]
    quality = choose(profile, target, experts, index.top_k, None if given is None else given.slots_per_layer)
    return given or plan_given(index, quality.slots_per_layer, f"a quality loss of at most {target:.2%}"), quality


def unscaled_loss_nats(task: TaskProfile, slots: Sequence[int]) -> float:
    """Return the loss model's sum, in nats per token, with scale 1 and every layer rerouting.

    Parameters
    ----------
    task : TaskProfile
        With divergences and coverage.
    slots : sequence of int, length = MoE layers
    """
    rows = zip(task.layer_kl_nats, task.coverage, slots, strict=True)
    return sum(max(0.0, divergence) * (1.0 - covered[count]) for divergence, covered, count in rows)


def _layer_losses(task: TaskProfile, num_experts: Sequence[int]) -> list[np.ndarray]:
    """Return, per layer, the predicted loss in nats per token with 0..E slots, never rising with more slots."""
    if not task.coverage or not task.layer_kl_nats or task.loss_scale is None:
        raise ProfileError(
            f"the profile of task {task.task!r} lacks divergences, coverage or a loss scale, which a quality target "
            f"needs: measure them with `emoe model profile MODEL --extend`."
        )
    tables = []
    for layer, experts in enumerate(num_experts):
        covered = np.asarray(task.coverage[layer], dtype=float)
        if len(covered) != experts + 1:
            raise ProfileError(
                f"the profile of task {task.task!r} knows {len(covered) - 1} experts in layer {layer}, the model has "
                f"{experts}: measure it again with `emoe model profile`."
            )
        missed = np.minimum.accumulate(1.0 - covered)
        missed[-1] = 0.0
        tables.append(task.loss_scale * max(0.0, task.layer_kl_nats[layer]) * missed)
    return tables


def _cheapest_slots(
    losses: Sequence[Sequence[np.ndarray]], num_experts: Sequence[int], top_k: int, allowed_nats: float
) -> tuple[int, ...]:
    """Add slots one at a time, where each helps the worst task most, until every task is within its allowance.

    The order of additions does not depend on the allowance, so a looser target never needs more slots in any layer.
    """
    slots = [min(top_k, experts) for experts in num_experts]
    while True:
        totals = [sum(float(table[count]) for table, count in zip(tables, slots, strict=True)) for tables in losses]
        worst = int(np.argmax(totals))
        if totals[worst] <= allowed_nats:
            return tuple(slots)
        gains = [_best_gain(table, count) for table, count in zip(losses[worst], slots, strict=True)]
        slots[int(np.argmax(gains))] += 1


def _best_gain(table: np.ndarray, count: int) -> float:
    """Return the most loss a slot saves; looking beyond the next slot sees past a step that buys nothing by itself."""
    more = np.arange(count + 1, len(table))
    return float(((table[count] - table[more]) / (more - count)).max()) if len(more) else -1.0


def _within(per_layer: np.ndarray, allowed_nats: float) -> frozenset[int]:
    """Return the layers that may reroute: cheapest first, while their sum stays within the allowance."""
    order = np.argsort(per_layer, kind="stable")
    spent = np.cumsum(per_layer[order])
    # The order of summation differs from the chooser's: a rounding error is no loss.
    return frozenset(int(layer) for layer in order[spent <= allowed_nats * (1 + 1e-9)])
