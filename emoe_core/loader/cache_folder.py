"""Where rebuilt things rest on disk: one directory that a user may delete at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache directory, made if missing.

    ``$EMOE_CACHE`` if set, else ``$XDG_CACHE_HOME/emoe``, else ``~/.cache/emoe``.
    """
    chosen = os.environ.get("EMOE_CACHE")
    if chosen:
        base = Path(chosen).expanduser()
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoe"
    base.mkdir(parents=True, exist_ok=True)
    return base
