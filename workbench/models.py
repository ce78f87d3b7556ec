"""Which checkpoint a name stands for: "reference" is the embedded model, built when missing; else a path or id."""

from __future__ import annotations

from pathlib import Path

REFERENCE = "reference"


def resolve_model(name: str | Path) -> str | Path:
    """Return the checkpoint to load for a model name.

    Parameters
    ----------
    name : str or Path
        "reference" (the embedded upcycled model), a directory, or a hub id.
    """
    if str(name) != REFERENCE:
        return name
    from workbench.reference_model import build

    return build()
