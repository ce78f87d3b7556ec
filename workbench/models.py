"""Which checkpoint a name stands for: an embedded model, built when missing; else a path or id."""

from __future__ import annotations

from pathlib import Path

REFERENCE = "reference"
# The embedded models by name, and the kind of reference model that each is.
EMBEDDED = {REFERENCE: "upcycled", "carved": "carved"}


def resolve_model(name: str | Path) -> str | Path:
    """Return the checkpoint to load for a model name.

    Parameters
    ----------
    name : str or Path
        "reference" (the embedded upcycled model), "carved" (the embedded fine-grained one), a directory, or a hub id.
    """
    kind = EMBEDDED.get(str(name))
    if kind is None:
        return name
    from workbench.reference_model import build

    return build(kind=kind)
