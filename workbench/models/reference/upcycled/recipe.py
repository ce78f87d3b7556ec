"""The upcycled kind's recipe: stacked expert corrections and routers, beside ``dialogues.jsonl.gz``.

The dialogues are text to fit on that no package ships.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from workbench.models.reference import recipe
from workbench.models.reference.upcycled.mixture import MixtureFeedForward, Shape

PARTS = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b", "router")


class Recipe(recipe.Recipe):
    """A checked recipe of upcycled experts."""

    kind: ClassVar[str] = "upcycled"
    limit_bytes: ClassVar[int] = 25_000_000

    @property
    def shape(self) -> Shape:
        """Experts, experts per token and rank."""
        return Shape(**self.description["shape"])


def save_recipe(folder: Path, mixtures: list[MixtureFeedForward], description: dict[str, Any]) -> Recipe:
    """Write the trained parameters of all layers as a recipe."""
    layers = [{part: getattr(mixture, part) for part in PARTS} for mixture in mixtures]
    return Recipe.save(folder, layers, asdict(mixtures[0].shape), description)
