"""Where a sweep's next point comes from: a list known at the start, or a search that learns from finished runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Protocol

from workbench.sweep.points import Point


class PointSource(Protocol):
    """Points of one part of a sweep, asked for one at a time."""

    @property
    def left(self) -> int:
        """Return how many points may still come."""

    def ask(self) -> Point | None:
        """Return the next point; None when there are no more."""

    def tell(self, point: Point, metrics: Mapping[str, float] | None) -> str | None:
        """Learn how a point ended (None: it failed), and return what people should know about that."""

    def conclusion(self) -> list[str]:
        """Return what came of it, as lines, when all points ended."""


class ListedPoints:
    """Points that are known at the start."""

    def __init__(self, points: Iterable[Point]) -> None:
        self._waiting = deque(points)

    @property
    def left(self) -> int:
        """Return how many points are still to come."""
        return len(self._waiting)

    def ask(self) -> Point | None:
        """Return the next point of the list."""
        return self._waiting.popleft() if self._waiting else None

    def tell(self, point: Point, metrics: Mapping[str, float] | None) -> str | None:
        """Nothing is learnt."""
        return None

    def conclusion(self) -> list[str]:
        """Nothing comes of a list but its runs."""
        return []
