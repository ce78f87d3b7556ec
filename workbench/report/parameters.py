"""Parameters of a run as texts, all in the style of sweep files: ``false``, ``null``, ``["a", "b"]``."""

from __future__ import annotations

import json
from typing import Any

from workbench.sweep.points import short


def parameter_text(value: Any) -> str:
    """Return a parameter's value as text; numbers and words as in names of runs."""
    return json.dumps(value, ensure_ascii=False) if value is None or isinstance(value, list | dict) else short(value)
