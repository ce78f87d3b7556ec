"""Which checkpoint a name stands for: an embedded or the tiny model, made when missing; else a path or id."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from emoe_core.checkpoint.hub import HUB_ID
from emoe_core.errors import CheckpointError, did_you_mean
from workbench.models.reference import EMBEDDED

# Random weights of 1 MB: shows in seconds that everything runs, and measures nothing.
TINY = "tiny"


def resolve_model(name: str | Path) -> str | Path:
    """Return the checkpoint to load for a model name.

    Parameters
    ----------
    name : str or Path
        "reference" (the embedded upcycled model), "carved" (the fine-grained one), "native" (the one trained from
        scratch), "tiny" (random weights, which only show that everything runs), a directory, or a hub id.

    Raises
    ------
    CheckpointError
        When it can be neither.
    """
    require_model(name)
    if str(name) == TINY:
        from workbench.models.reference.tiny import cached_tiny_moe

        return cached_tiny_moe()
    kind = EMBEDDED.get(str(name))
    if kind is None:
        return name
    from workbench.models.reference import build

    return build(kind=kind)


def require_model(name: str | Path) -> None:
    """Raise `CheckpointError` when a name is none that `resolve_model` knows, no path that exists, and no hub id."""
    known = (*EMBEDDED, TINY)
    text = str(name)
    if text in known or HUB_ID.fullmatch(text) or Path(name).expanduser().exists():
        return
    meant = did_you_mean(get_close_matches(text, known, n=1))
    raise CheckpointError(
        f"{text} does not exist.{meant} Give the folder of a Hugging Face checkpoint, a hub id (OWNER/NAME), or "
        f"one of {', '.join(map(repr, known))}."
    )
