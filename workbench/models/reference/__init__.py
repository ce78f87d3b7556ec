"""The embedded reference models: real MoE checkpoints built on this machine from recipes.

Two are grown from a packaged dense model, the third was trained from scratch, its routers included.

Each kind is a folder with the same three verbs; `KINDS` names them. The functions here import a kind when it is used,
because the kinds import torch and transformers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from emoe_core.errors import require_known

# Kinds, by the names that users give.
REFERENCE = "reference"
EMBEDDED = {REFERENCE: "upcycled", "carved": "carved", "native": "native"}
KINDS = tuple(EMBEDDED.values())
RECIPES = Path(__file__).parent / "recipes"


def build(dest: Path | str | None = None, recipe: Path | str | None = None, kind: str = "upcycled") -> Path:
    """Build the checkpoint from a recipe, or return it when it is built; the default place is in the cache."""
    return _verb(kind, "build")(dest, recipe)


def is_built(recipe: Path | str | None = None, kind: str = "upcycled") -> bool:
    """Tell whether the checkpoint of a recipe is in the cache."""
    return _verb(kind, "is_built")(recipe)


def verify(path: Path | str | None = None, kind: str = "upcycled") -> dict[str, str]:
    """Hash the files of a built checkpoint again; return the checksums or raise with the altered files named."""
    return _verb(kind, "verify")(path)


def _verb(kind: str, name: str) -> Any:
    require_known(kind, KINDS, "kind of reference model")
    return getattr(importlib.import_module(f"workbench.models.reference.{kind}.build"), name)
