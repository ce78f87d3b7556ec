"""The upcycled kind's recipe: stacked expert corrections and routers, beside ``dialogues.jsonl.gz``.

The dialogues are text to fit on that no package ships.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workbench.models.reference import recipe


@dataclass(frozen=True)
class Shape:
    """Experts per layer, experts per token, and the rank of an expert's correction."""

    experts: int = 8
    top_k: int = 2
    rank: int = 8


class Recipe(recipe.Recipe):
    """A checked recipe of upcycled experts."""

    kind: ClassVar[str] = "upcycled"
    limit_bytes: ClassVar[int] = 25_000_000

    @property
    def shape(self) -> Shape:
        """Experts, experts per token and rank."""
        return Shape(**self.description["shape"])
