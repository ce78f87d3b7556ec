"""Reading and writing our own JSON files: whole or not at all, with one clear error for a file that is not ours.

A file is one object with a ``format`` number. Lists become tuples, for the frozen dataclasses that the contents become.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import EmoeError


def write_whole(path: str | Path, text: str) -> Path:
    """Write a text file atomically, with its folder, and return its path; nothing is left behind on failure."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(scratch).replace(target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return target


def read_object(
    path: Path, formats: Collection[int], error_class: type[EmoeError], name: str, what: str, fix: str
) -> dict[str, Any]:
    """Return the object of a file, without its ``format``.

    Parameters
    ----------
    path : Path
    formats : collection of int
        Those that can be read.
    error_class : type
        Raised with the fix in its message.
    name, what : str
        What the file holds, for messages: "profile" and "a task profile".
    fix : str
        What to do about it: "measure it again".

    Raises
    ------
    error_class
        When the file cannot be read, is not JSON, or has another format. A missing one raises FileNotFoundError.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise error_class(f"{path} cannot be read as {what} ({error}); {fix}.") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found not in formats:
        readable = ", ".join(str(number) for number in formats)
        raise error_class(f"{path} has {name} format {found}, this version reads {readable}: {fix}.")
    return dict(content)


def frozen(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object's fields with JSON's lists as tuples, at every depth."""

    def freeze(value: Any) -> Any:
        return tuple(freeze(item) for item in value) if isinstance(value, list) else value

    return {name: freeze(value) for name, value in entry.items()}
