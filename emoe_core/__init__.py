"""eMoE: memory-efficient Mixture-of-Experts inference, exact when asked and lossy by a dial."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from emoe_core.errors import EmoeError

if TYPE_CHECKING:
    from emoe_core.config import EngineConfig
    from emoe_core.engine import Engine, load
    from emoe_core.generation import Generation
    from emoe_core.metrics import Counters, RunStats

# Imported on first use: torch and transformers take seconds, which the command line's help need not wait for.
_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "load": "engine",
    "Generation": "generation",
    "Counters": "metrics",
    "RunStats": "metrics",
}

__all__ = ["Counters", "EmoeError", "Engine", "EngineConfig", "Generation", "RunStats", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
