"""The carved kind's recipe: for each layer the neurons' order, the router, and the repair (see `layer`)."""

from __future__ import annotations

from typing import ClassVar

from workbench.models.reference import recipe
from workbench.models.reference.carved.layer import Shape


class Recipe(recipe.Recipe):
    """A checked recipe of a carved model."""

    kind: ClassVar[str] = "carved"
    limit_bytes: ClassVar[int] = 19_000_000

    @property
    def shape(self) -> Shape:
        """Experts, experts per token and shared neurons."""
        return Shape(**self.description["shape"])
