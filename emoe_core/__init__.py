"""eMoE: memory-efficient Mixture-of-Experts inference, exact when asked and lossy by a dial."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import EmoeError

if TYPE_CHECKING:
    from .engine import Engine, load
    from .generation import Generation, Scored
    from .metrics import Counters, RunStats
    from .options import EngineConfig

# Imported on first use: torch and transformers take seconds, which the command line's help need not wait for.
_HOMES = {
    "Engine": "engine",
    "EngineConfig": "options",
    "load": "engine",
    "Generation": "generation",
    "Scored": "generation",
    "Counters": "metrics",
    "RunStats": "metrics",
}

__all__ = ["Counters", "EmoeError", "Engine", "EngineConfig", "Generation", "RunStats", "Scored", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
