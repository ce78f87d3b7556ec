"""Reading YAML files that others may have written: plain data, and no more of it than the file's size suggests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from emoe_core.errors import ExperimentError

MAX_BYTES = 1 << 16
MAX_VALUES = 100_000


def read_yaml(path: Path) -> Any:
    """Return what a YAML file says.

    Raises
    ------
    ExperimentError
        When the file cannot be read, is not YAML or longer than `MAX_BYTES`, or stands for more than `MAX_VALUES`
        values: a few nested aliases stand for more than any memory holds.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is longer than {MAX_BYTES:,} bytes, and no sweep file is")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if _values(content, {}) > MAX_VALUES:
            raise ValueError(f"its aliases stand for more than {MAX_VALUES:,} values")
    except Exception as error:  # ill-formed dates, numbers and depths raise several types beside YAMLError
        raise ExperimentError(f"{path} is not YAML that a sweep can be read from: {error!s:.500}") from None
    return content


def _values(node: Any, known: dict[int, int | None]) -> int:
    """Return how many values a document stands for, every alias written out."""
    if not isinstance(node, dict | list):
        return 1
    if id(node) not in known:
        known[id(node)] = None
        inner = node.values() if isinstance(node, dict) else node
        known[id(node)] = 1 + sum(_values(value, known) for value in inner)
    found = known[id(node)]
    if found is None:
        raise ValueError("an alias stands for what it is part of")
    return found
