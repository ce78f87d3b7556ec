"""Reading YAML files that others may have written: plain data, and no more of it than the file's size suggests.

Unquoted scalars are those of YAML 1.2's core schema, with underscores between digits. PyYAML reads YAML 1.1, where
``1e-3`` is a text, ``010`` eight, ``1:30`` ninety, ``no`` false and ``2024-01-31`` a date.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from emoe_core.errors import ExperimentError

MAX_BYTES = 1 << 16
MAX_VALUES = 100_000


class CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}

    def whole_number(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)


_TAG = "tag:yaml.org,2002:"
_DIGITS = "[0-9][0-9_]*"
_POINTED = rf"(?:\.{_DIGITS}|{_DIGITS}(?:\.[0-9_]*)?)"
_SCALARS = {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": rf"[-+]?{_POINTED}(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": "<<",
}
for _kind, _pattern in _SCALARS.items():  # the first that fits counts
    CoreLoader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(rf"(?:{_pattern})\Z"), None)
CoreLoader.add_constructor(f"{_TAG}int", CoreLoader.whole_number)


def unquoted(text: str) -> Any:
    """Return what a text means to YAML where no quotes stand around it; itself when that is no single value."""
    tag = CoreLoader("").resolve(yaml.ScalarNode, text, (True, False))
    try:
        return CoreLoader("").construct_object(yaml.ScalarNode(tag, text))
    except (ValueError, yaml.YAMLError):
        return text


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
        content = yaml.load(path.read_text(encoding="utf-8"), CoreLoader)
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
