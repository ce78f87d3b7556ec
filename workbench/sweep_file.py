"""Sweep files: what a YAML file may say, and the points it stands for.

A sweep file names a sweep and its stages. A *stage* runs one notebook over a grid of its parameters; a *point* is one
such run. ::

    name: quick
    description: Memory against quality on the reference model.
    stages:
      - notebook: notebooks/02_memory_budget.ipynb
        kind: timing                  # one run at a time, machine to itself; `quality` runs may overlap
        fixed: {prompts: 16}
        grid: {budget: ["20%", "60%"], tolerance: [0.0, 1.0]}
        exclude: [{budget: "20%", tolerance: 0.0}]
        metrics: [peak_bytes, perplexity_ratio]   # shown as runs finish
        label: lossy                  # part of the runs' names, where stages of one notebook differ in what is fixed
        seconds_per_run: 60           # for the estimate, until the store knows better

A file with a single stage may put these keys beside `name`. Points keep the order of the file: the first axis varies
slowest. Parameters are checked against the notebook's cell tagged ``parameters``: unknown names and wrong types are
refused before anything runs, because papermill itself only warns. This module runs nothing.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from emoe_core.errors import ExperimentError
from emoe_core.json_file import parse, read_text
from workbench.models import EMBEDDED
from workbench.store import project_root
from workbench.yaml_file import read_yaml

CHECKED_TYPES = {"bool", "int", "float", "str", "list", "None"}
MAX_POINTS = 10_000
MODEL_PARAMETER = "model"
RECIPES = Path(__file__).parent / "reference_model" / "recipes"
Scalar = bool | int | float | str | None


class Stage(BaseModel):
    """One notebook over a grid of its parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    notebook: str
    kind: Literal["timing", "quality"]
    fixed: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    grid: dict[str, list[Scalar]] = Field(default_factory=dict)
    exclude: list[dict[str, Scalar]] = Field(default_factory=list)
    metrics: list[str] = Field(default_factory=list)
    label: str = ""
    seconds_per_run: float | None = Field(default=None, gt=0, strict=False)

    @field_validator("grid")
    @classmethod
    def _axes_have_values(cls, grid: dict[str, list[Scalar]]) -> dict[str, list[Scalar]]:
        for name, values in grid.items():
            if not values:
                raise ValueError(f"axis {name!r} has no values")
            if len({json.dumps(value) for value in values}) < len(values):
                raise ValueError(f"axis {name!r} names a value twice")
        return grid

    @model_validator(mode="after")
    def _names_agree(self) -> Stage:
        twice = sorted(set(self.fixed) & set(self.grid))
        if twice:
            raise ValueError(f"both fixed and on the grid: {', '.join(twice)}")
        unknown = sorted({name for entry in self.exclude for name in entry} - set(self.fixed) - set(self.grid))
        if unknown:
            raise ValueError(f"exclude names parameters that the stage does not set: {', '.join(unknown)}")
        return self


class SweepFile(BaseModel):
    """A named list of stages."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _accept_a_single_stage(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "stages" in data:
            return data
        outer = {name: data[name] for name in ("name", "description") if name in data}
        return outer | {"stages": [{name: value for name, value in data.items() if name not in outer}]}


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes
    ----------
    parameters : dict
        What is handed to the notebook; `axes` is the part of it that varies within the stage.
    digest : str
        Identity of the run: notebook source, parameters and the model. Equal digests need not run twice.
    """

    stage: Stage
    notebook: Path
    parameters: dict[str, Any]
    axes: dict[str, Any]
    digest: str

    @property
    def label(self) -> str:
        """Return a short name: the notebook, the stage's label and the values of the axes."""
        varying = [f"{name}={short(value)}" for name, value in self.axes.items()]
        return " ".join(part for part in (self.notebook.stem, self.stage.label, *varying) if part)


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

    def literal(self) -> Any:
        """Return the default's value, None when it is not a literal."""
        try:
            return ast.literal_eval(self.default)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None


def short(value: Any) -> str:
    """Return a value as shown in names of runs."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def read_sweep(path: Path) -> SweepFile:
    """Read and validate a sweep file.

    Raises
    ------
    ExperimentError
        When the file is missing, is not YAML, or says something that a sweep does not know.
    """
    if not path.is_file():
        raise ExperimentError(f"no sweep file at {path}. Sweeps lie in sweeps/, for example sweeps/quick.yaml.")
    try:
        return SweepFile.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = [f"{path} is not a usable sweep file:"]
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"]) or "top level"
            what = (
                "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
            )
            lines.append(f"  {place}: {what}")
        raise ExperimentError("\n".join(lines)) from None


def expand(sweep: SweepFile, beside: Path | None = None) -> list[Point]:
    """Return the points of a sweep in the order they run, each checked against its notebook.

    Parameters
    ----------
    sweep : SweepFile
    beside : Path, optional
        Folder to look for notebooks in after the project root, usually that of the sweep file.
    """
    points: list[Point] = []
    for stage in sweep.stages:
        notebook = find_notebook(stage.notebook, beside)
        known = notebook_parameters(notebook)
        settings: list[tuple[str, Any]] = [
            *stage.fixed.items(),
            *((n, v) for n, axis in stage.grid.items() for v in axis),
        ]
        for name, value in settings:
            check_parameter(notebook, known, name, value)
        source = source_hash(notebook)
        model_default = known[MODEL_PARAMETER].literal() if MODEL_PARAMETER in known else None
        if len(points) + math.prod(len(axis) for axis in stage.grid.values()) > MAX_POINTS:
            raise ExperimentError(f"sweep {sweep.name!r} has more than {MAX_POINTS:,} points: leave out some values.")
        for values in itertools.product(*stage.grid.values()):
            axes = dict(zip(stage.grid, values, strict=True))
            parameters = {**stage.fixed, **axes}
            if any(all(parameters[n] == v for n, v in entry.items()) for entry in stage.exclude):
                continue
            model = parameters.get(MODEL_PARAMETER, model_default)
            points.append(Point(stage, notebook, parameters, axes, point_digest(source, parameters, model)))
    seen: set[str] = set()
    for point in points:
        if point.digest in seen:
            raise ExperimentError(f"sweep {sweep.name!r} holds the same run twice: {point.label} {point.parameters}")
        seen.add(point.digest)
    if not points:
        raise ExperimentError(f"sweep {sweep.name!r} excludes every point of its grid.")
    return points


def find_notebook(name: str, beside: Path | None = None) -> Path:
    """Return the notebook's path, looked for from the project root, then beside the sweep file."""
    places = [project_root(), *([beside] if beside else [])]
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
    sources = [cell["source"] for cell in read_cells(notebook) if "parameters" in cell["tags"]]
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


def check_parameter(notebook: Path, known: dict[str, Parameter], name: str, value: Any) -> None:
    """Refuse a parameter that the notebook does not have, or a value of another type than annotated or defaulted."""
    if name not in known:
        listing = ", ".join(sorted(known))
        raise ExperimentError(f"{notebook.name} has no parameter {name!r}. Known parameters: {listing}.")
    allowed = known[name].type_names()
    if not allowed:
        return
    given = "None" if value is None else type(value).__name__
    if given not in allowed and not (given == "int" and "float" in allowed):
        raise ExperimentError(
            f"{notebook.name}: parameter {name!r} is {value!r} ({given}), but takes {' or '.join(sorted(allowed))} "
            f"(default {known[name].default})."
        )


def read_cells(notebook: Path) -> list[dict[str, Any]]:
    """Return of each of a notebook's cells its ``cell_type``, its ``source`` as one text, and its ``tags``."""
    try:
        return [
            {
                "cell_type": cell["cell_type"],
                "source": "".join(cell["source"]),
                "tags": list(cell.get("metadata", {}).get("tags", [])),
            }
            for cell in parse(read_text(notebook))["cells"]
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExperimentError(f"{notebook} is not a readable notebook: {error!r:.200}") from None


def source_hash(notebook: Path) -> str:
    """Return a hash of a notebook's cells; outputs and metadata do not count."""
    source = [cell["source"] for cell in read_cells(notebook) if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()


def point_digest(source: str, parameters: dict[str, Any], model: Any = None) -> str:
    """Return the identity of a run from the notebook's source, its parameters and the state of its model."""
    parts = [source, dict(sorted(parameters.items())), model_state(model)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def model_state(model: Any) -> str:
    """Return what tells one state of a model from another, cheaply: weights are not read.

    An embedded model is its recipe, a checkpoint folder its configuration and the sizes and times of its weights.
    """
    if model in EMBEDDED:
        description = RECIPES / EMBEDDED[model] / "recipe.json"
        return hashlib.sha256(description.read_bytes()).hexdigest() if description.exists() else ""
    folder = Path(str(model)).expanduser()
    if model is None or not (folder / "config.json").is_file():
        return ""
    files = [(item.name, item.stat().st_size, item.stat().st_mtime_ns) for item in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256((folder / "config.json").read_bytes() + json.dumps(files).encode()).hexdigest()
