"""The embedded reference models: real MoE checkpoints grown on this machine from a packaged dense model.

Each kind is a folder with the same four verbs; `KINDS` names them. The functions here import a kind when it is used,
because the kinds import torch and transformers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from emoe_core.errors import require_known

# Kinds, by the names that users give.
REFERENCE = "reference"
EMBEDDED = {REFERENCE: "upcycled", "carved": "carved"}
KINDS = tuple(EMBEDDED.values())
RECIPES = Path(__file__).parent / "recipes"


def train(out: Path | str, seed: int = 0, kind: str = "upcycled", **options: Any) -> Path:
    """Compute a recipe and write it to the folder `out`; see the kind's ``train`` module for options."""
    return _verb(kind, "train")(out, seed, **options)


def build(dest: Path | str | None = None, recipe: Path | str | None = None, kind: str = "upcycled") -> Path:
    """Build the checkpoint from a recipe, or return it when it is built; the default place is in the cache."""
    return _verb(kind, "build")(dest, recipe)


def is_built(recipe: Path | str | None = None, kind: str = "upcycled") -> bool:
    """Tell whether the checkpoint of a recipe is in the cache."""
    return _verb(kind, "build", "is_built")(recipe)


def verify(path: Path | str | None = None, kind: str = "upcycled") -> dict[str, str]:
    """Hash the files of a built checkpoint again; return the checksums or raise with the altered files named."""
    return _verb(kind, "build", "verify")(path)


def evaluate(
    path: Path | str | None = None, recipe: Path | str | None = None, kind: str = "upcycled", **options: Any
) -> dict[str, Any]:
    """Measure perplexity, routing and chat of a built checkpoint; write figures beside the recipe, and the card."""
    return _verb(kind, "evaluate")(path, recipe, **options)


def _verb(kind: str, module: str, name: str | None = None) -> Any:
    require_known(kind, KINDS, "kind of reference model")
    return getattr(importlib.import_module(f"workbench.models.reference.{kind}.{module}"), name or module)
