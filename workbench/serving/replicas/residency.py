"""Which experts a replica holds, and which its tasks want: what a router is told.

Experts are bits of an integer, that of expert ``e`` in MoE layer ``l`` at ``l * experts + e``, ``experts`` being those
of the largest layer: a few hundred bytes for any model, sent once a second.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

# Serve's controller unpickles residencies: it need not wait for torch.
if TYPE_CHECKING:
    from emoe_core.engine import Engine

Replica = TypeVar("Replica", bound=Hashable)


@dataclass(frozen=True)
class Residency:
    """A replica at one moment.

    Attributes
    ----------
    held : int
        Bits of the experts in slots.
    wanted : mapping of str to (int, int)
        Of each task that it has served: how many requests, and bits of the experts that the task alone would get.
    """

    held: int = 0
    wanted: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def look(engine: Engine, served: Mapping[str, int]) -> Residency:
    """Return an engine's residency; between forward passes only. ``served`` counts requests by task."""
    table, control = engine.loader.table, engine.control
    layers, experts = control.shape
    wanted = {}
    for task, requests in served.items():
        plan = control.wanted(task)
        if plan is not None:
            wanted[task] = (requests, _bits(plan.experts, experts))
    return Residency(_bits((table.resident(layer) for layer in range(layers)), experts), wanted)


def missing_for(task: str | None, reports: Mapping[Replica, Residency]) -> Callable[[Replica], int]:
    """Return how many of a task's experts each replica lacks.

    What the task wants is what the replica says that has served most of its requests; where none has, all lack nothing.
    """
    known = [wanted for report in reports.values() for name, wanted in report.wanted.items() if name == task]
    _, wanted = max(known, default=(0, 0))
    return lambda replica: (wanted & ~reports[replica].held).bit_count()


def _bits(layers: Iterable[Iterable[int]], experts: int) -> int:
    return sum(1 << layer * experts + expert for layer, chosen in enumerate(layers) for expert in set(chosen))
