"""What serving costs were measured under, beside what they are used under.

Costs are seconds of one model under one expert budget, tolerance and data type, on one device and machine. Schedulers
that go by them, and simulations, decide by wrong seconds where any of these is another one. `differences` says which;
whoever uses costs tells people (`warning`), or refuses where costs must be those of an engine (`require_conditions`).
The predictor is not among them: what a prediction takes is small beside the rest, and it does not change a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from emoe_core.scheduler.costs import CostsError, ServingCosts
from workbench.machine.environment import compute_threads, describe_cpu

if TYPE_CHECKING:
    import emoe_core


@dataclass(frozen=True)
class Conditions:
    """What costs hold for, beside the model; None is not known and is not compared.

    Attributes
    ----------
    slots_per_layer : tuple of int or None
        Experts that each layer holds.
    tolerance : float or None
        Miss tolerance: at 0 a step also waits for experts that it lacks.
    dtype, expert_dtype, device : str or None
        Of the engine, "auto" resolved where it may be.
    cpu : str or None
        The processor's name.
    threads : int or None
        Threads that torch computes with.
    """

    slots_per_layer: tuple[int, ...] | None = None
    tolerance: float | None = None
    dtype: str | None = None
    expert_dtype: str | None = None
    device: str | None = None
    cpu: str | None = None
    threads: int | None = None


def conditions_of(costs: ServingCosts) -> Conditions:
    """Return what costs were measured under."""
    told: Mapping[str, Any] = costs.settings
    return Conditions(
        costs.slots_per_layer,
        told.get("tolerance"),
        told.get("dtype"),
        told.get("expert_dtype", "auto"),
        told.get("device"),
        costs.environment.get("cpu"),
        costs.environment.get("threads"),
    )


def conditions_here(engine: emoe_core.Engine | None = None) -> Conditions:
    """Return what a loaded engine serves under; without one, what is known of this machine."""
    machine = Conditions(cpu=describe_cpu()[0], threads=compute_threads())
    if engine is None:
        return machine
    return Conditions(
        tuple(engine.plan.slots_per_layer),
        engine.tolerance,
        str(engine.index.dtype).removeprefix("torch."),
        engine.config.expert_dtype,
        engine.device.type,
        machine.cpu,
        machine.threads,
    )


def differences(costs: ServingCosts, used: Conditions) -> list[str]:
    """Return what differs, in words: the costs' own value, then the one they are used under."""
    measured, found = conditions_of(costs), []
    for item in fields(Conditions):
        own, other = getattr(measured, item.name), getattr(used, item.name)
        if own is None or other is None or own == other:
            continue
        words, shown = _WORDS[item.name]
        found.append(f"{words} {shown(own)}, here {shown(other)}")
    return found


def warning(costs: ServingCosts, used: Conditions) -> str | None:
    """Return a sentence on what differs and how to mend it, None where nothing does."""
    found = differences(costs, used)
    if not found:
        return None
    return (
        f"the serving costs were measured under other conditions ({'; '.join(found)}), so what goes by them goes by "
        "wrong times. Measure them on this machine, alone, with `emoe model costs MODEL --budget BUDGET`"
    )


def require_conditions(costs: ServingCosts, used: Conditions) -> None:
    """Raise `CostsError` where costs were measured under other conditions."""
    if told := warning(costs, used):
        raise CostsError(told)


_WORDS: dict[str, tuple[str, Any]] = {
    "slots_per_layer": ("expert slots", lambda slots: f"{sum(slots)} in {len(slots)} layers"),
    "tolerance": ("tolerance", lambda value: f"{value:g}" if isinstance(value, int | float) else str(value)),
    "dtype": ("dtype", str),
    "expert_dtype": ("expert dtype", str),
    "device": ("device", str),
    "cpu": ("processor", str),
    "threads": ("threads", str),
}
