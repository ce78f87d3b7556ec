"""Notebooks as sweeps see them: where they lie, which parameters they take, and what tells two of them apart.

Parameters are those that the cell tagged ``parameters`` assigns. The cell is parsed, not run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe_core.errors import ExperimentError
from emoe_core.files import parse, read_text
from workbench.tracking.place import project_root

CHECKED_TYPES = {"bool", "int", "float", "str", "list", "None"}
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}


@dataclass(frozen=True)
class Parameter:
    """A parameter as a notebook's cell states it: annotation and default, as source text."""

    annotation: str
    default: str

    def type_names(self) -> set[str]:
        """Return the names of types that values may have; empty when anything goes or nothing is known."""
        if self.annotation:
            names = {re.split(r"\[", part.strip())[0] for part in self.annotation.split("|")}
            return names if names <= CHECKED_TYPES else set()
        default = self.literal()
        return set() if default is None else {type(default).__name__}

    def meant(self, value: Any) -> Any:
        """Return a value as the parameter takes it, where a file can say it in another type: yes, or 1e3 for 1000."""
        allowed = self.type_names()
        if isinstance(value, str) and "bool" in allowed and "str" not in allowed:
            return SWITCHES.get(value.lower(), value)
        if isinstance(value, float) and value.is_integer() and "int" in allowed and "float" not in allowed:
            return int(value)
        return value

    def literal(self) -> Any:
        """Return the default's value, None when it is not a literal."""
        try:
            return ast.literal_eval(self.default)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None


def find_notebook(name: str, beside: Path | None = None) -> Path:
    """Return the notebook's path: from the project root, else the working directory, else beside the sweep file."""
    # By their names: a project may lie behind a link.
    places = list(dict.fromkeys([project_root(), Path.cwd(), *([beside.absolute()] if beside else [])]))
    for place in places:
        found = Path(os.path.normpath(place.absolute() / name))
        if not found.is_file():
            continue
        # By its name: a link that lies there is there, wherever it leads. A whole path says openly where it leads.
        inside = any(found.is_relative_to(os.path.normpath(top.absolute())) for top in places)
        if not inside and not Path(name).is_absolute():
            raise ExperimentError(
                f"the notebook {name!r} leads out of {' and '.join(str(top) for top in places)}: copy it beside the "
                f"sweep file, or give its whole path."
            )
        return found.resolve()
    raise ExperimentError(f"no notebook {name!r} under {' or '.join(str(place) for place in places)}.")


def notebook_parameters(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters that a notebook's cell tagged ``parameters`` assigns, by name.

    The cell is parsed, not run; papermill's own inspection misses annotations such as ``str | None``.
    """
    sources = [cell["source"] for cell in cells_of(read_notebook(notebook)) if "parameters" in cell["tags"]]
    if not sources:
        raise ExperimentError(f"{notebook} has no cell tagged 'parameters', so a sweep cannot set anything in it.")
    try:
        statements = ast.parse(sources[0]).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ExperimentError(f"{notebook}: the cell tagged 'parameters' is not Python: {error}") from None
    known = {}
    for statement in statements:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            annotation = ast.unparse(statement.annotation)
            known[statement.target.id] = Parameter(annotation, ast.unparse(statement.value))
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    known[target.id] = Parameter("", ast.unparse(statement.value))
    return known


def read_notebook(notebook: Path) -> dict[str, Any]:
    """Return a notebook's content; see `parse_notebook`."""
    try:
        text = read_text(notebook)
    except OSError as error:
        raise ExperimentError(f"cannot read {notebook}: {error.strerror}.") from None
    except ValueError as error:
        raise ExperimentError(f"{notebook} is not a readable notebook: {error!r:.200}") from None
    return parse_notebook(text, str(notebook))


def parse_notebook(text: str, name: str) -> dict[str, Any]:
    """Return the content of a notebook's file, whose cells `cells_of` can read.

    Raises
    ------
    ExperimentError
        That names it, when it is no notebook.
    """
    try:
        content = parse(text)
        cells_of(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExperimentError(f"{name} is not a readable notebook: {error!r:.200}") from None
    return dict(content)


def cells_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return of each of a notebook's cells its ``cell_type``, its ``source`` as one text, and its ``tags``."""
    return [
        {
            "cell_type": cell["cell_type"],
            "source": "".join(cell["source"]),
            "tags": list(cell.get("metadata", {}).get("tags", [])),
        }
        for cell in content["cells"]
    ]


def source_hash(notebook: Path) -> str:
    """Return a hash of a notebook's cells; outputs and metadata do not count."""
    return _code_hash(cells_of(read_notebook(notebook)))


def notebook_hash(content: dict[str, Any]) -> str:
    """Return a short hash of a notebook's code without the cell of parameters that a run adds."""
    return _code_hash([cell for cell in cells_of(content) if "injected-parameters" not in cell["tags"]])[:16]


def _code_hash(cells: list[dict[str, Any]]) -> str:
    source = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()
