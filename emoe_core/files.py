"""Files of our own, written whole or not at all, and reading JSON that others may have written.

A file or folder is made in a folder beside its place and renamed when it is complete. One of our own JSON files is one
object with a ``format`` number, and becomes a frozen dataclass: `typed` checks every field against its annotation.
Whatever a file holds, reading it raises an error that a user can mend, and no more than `MAX_BYTES` of it are taken
into memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from emoe_core.errors import EmoeError

MAX_BYTES = 64 << 20
"""More than any configuration, index of shards or profile comes to."""
SCRATCH = ".unfinished-"
"""How the folders begin in which things lie that are not whole yet; only a killed process leaves one."""
Kind = TypeVar("Kind")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file to, which takes the place of ``path`` when the block ends without an error.

    Its folder is made if missing. The yielded path has the same name; nothing of it is left behind on failure.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=SCRATCH) as folder:
        scratch = Path(folder) / target.name
        yield scratch
        scratch.replace(target)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill, as `whole_file` does a path; what stands at ``path`` goes when it is complete."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=SCRATCH, ignore_cleanup_errors=True) as folder:
        scratch = Path(folder) / target.name
        scratch.mkdir()
        yield scratch
        if target.exists():
            target.rename(Path(folder) / "replaced")
        scratch.rename(target)


def write_whole(path: str | Path, text: str) -> Path:
    """Write a text file as `whole_file` does, and return its path."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return Path(path)


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
        content = parse(read_text(path))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise error_class(f"{path} cannot be read as {what} ({error}); {fix}.") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found not in formats:
        readable = ", ".join(str(number) for number in formats)
        raise error_class(f"{path} has {name} format {found}, this version reads {readable}: {fix}.")
    return dict(content)


def read_text(path: Path) -> str:
    """Return a text file; ValueError when it is longer than `MAX_BYTES` or no UTF-8, OSError as usual."""
    size_bytes = path.stat().st_size
    if size_bytes > MAX_BYTES:
        raise ValueError(f"it has {size_bytes:,} bytes, and such files have at most {MAX_BYTES:,}")
    return path.read_text(encoding="utf-8")


def parse(text: str | bytes) -> Any:
    """Return what a JSON text says; ValueError when it is not JSON, or is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def typed(kind: type[Kind], content: Mapping[str, Any]) -> Kind:
    """Return a dataclass from an object of JSON; lists become the tuples that the fields ask for.

    Raises
    ------
    ValueError
        When a field is missing, is unknown to a class that forbids it, or has another type than its annotation. The
        message names the first.
    """
    try:
        wanted: Any = kind
        found: Kind = _adapter(wanted).validate_json(json.dumps(content), strict=True)
        return found
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the content"
        raise ValueError(f"{place}: {first['msg']}") from None
