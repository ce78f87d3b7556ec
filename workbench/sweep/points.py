"""The points of a sweep: which runs a sweep file stands for, and what identifies each.

Parameters are checked against the notebook's cell tagged ``parameters``: unknown names and wrong types are refused
before anything runs, because papermill itself only warns, and so are values that the bench knows to be impossible.
Nothing is run here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from emoe_core.errors import ExperimentError
from workbench.models.reference import EMBEDDED, RECIPES
from workbench.sweep.file import SweepSource
from workbench.sweep.schema import Needs, Stage
from workbench.sweep.values import check_parameter, check_value
from workbench.tracking.notebook import Parameter, find_notebook, notebook_parameters, source_hash

MODEL_PARAMETER = "model"
MAX_POINTS = 10_000


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes
    ----------
    parameters : dict
        What is handed to the notebook; `axes` is the part of it that varies within the stage.
    digest : str
        Identity of the run: notebook source, parameters and the model. Equal digests need not run twice.
    index : int
        Place in the sweep.
    """

    stage: Stage
    notebook: Path
    parameters: dict[str, Any]
    axes: dict[str, Any]
    digest: str
    index: int = 0

    @property
    def label(self) -> str:
        """Return a short name: the notebook, the stage's label and the values of the axes."""
        varying = [f"{name}={short(value)}" for name, value in self.axes.items()]
        return " ".join(part for part in (self.notebook.stem, self.stage.label, *varying) if part)

    @property
    def needs(self) -> Needs:
        """Return what the run takes of a machine."""
        return self.stage.needs_of(self.parameters)


@dataclass(frozen=True)
class StagePlan:
    """A stage whose names and types were checked against its notebook.

    Attributes
    ----------
    source : str
        Hash of the notebook's code.
    model : object
        The notebook's default model.
    first : int
        Place in the sweep of the stage's first run.
    repeats : StagePlan or None
        The control whose run this stage does again.
    """

    stage: Stage
    notebook: Path
    source: str
    model: Any
    first: int
    repeats: StagePlan | None = None

    def point(self, axes: dict[str, Any], place: int) -> Point:
        """Return the run with these values at a place within the stage."""
        parameters = {**self.stage.fixed, **axes}
        digest = point_digest(self.source, parameters, parameters.get(MODEL_PARAMETER, self.model))
        digest += "-again" if self.repeats else ""
        return Point(self.stage, self.notebook, parameters, axes, digest, self.first + place)

    @cached_property
    def points(self) -> list[Point]:
        """Return the runs of the stage in order."""
        grid = self.stage.grid
        if math.prod(len(axis) for axis in grid.values()) > MAX_POINTS:
            raise ExperimentError(f"a grid has more than {MAX_POINTS:,} points: leave out some values.")
        found = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
        kept = [axes for axes in found if not self.stage.excludes({**self.stage.fixed, **axes})]
        return [self.point(axes, place) for place, axes in enumerate(kept)]


def plan_stages(sweep: SweepSource, beside: Path | None = None) -> list[StagePlan]:
    """Return the stages of a sweep in order, each checked against its notebook.

    Parameters
    ----------
    sweep : SweepSource
    beside : Path, optional
        Folder to look for notebooks in after the project root, usually that of the sweep file.

    Raises
    ------
    ExperimentError
        With file and line, when a notebook is missing or does not take a parameter or its value.
    """
    plans, first = [], 0
    for number, written in enumerate(sweep.file.stages):
        try:
            notebook = find_notebook(written.notebook, beside)
            known = notebook_parameters(notebook)
        except ExperimentError as error:
            raise ExperimentError(f"{sweep.source.place('stages', number, 'notebook')}: {error}") from None
        stage = written.read_by(partial(meant, known))
        for keys, name, value in settings(stage):
            try:
                check_parameter(notebook, known, name, value)
                check_value(known, name, value)
            except ExperimentError as error:
                raise ExperimentError(f"{sweep.source.place('stages', number, *keys, name)}: {error}") from None
        model = known[MODEL_PARAMETER].literal() if MODEL_PARAMETER in known else None
        plan = StagePlan(stage, notebook, source_hash(notebook), model, first)
        plans.append(plan)
        first += len(plan.points)
    for control in [plan for plan in plans if plan.stage.control]:
        stage = control.stage.model_copy(update={"label": f"{control.stage.label} again".strip()})
        plans.append(replace(control, stage=stage, first=first, repeats=control))
        first += 1
    check_points(sweep.file.name, plans)
    return plans


def chosen(plans: list[StagePlan], label: str | None) -> list[StagePlan]:
    """Return the stages of a label, and the controls where these time; every stage where there is no label.

    Raises
    ------
    ExperimentError
        When no stage has the label; the message lists those there are.
    """
    if label is None:
        return plans
    found = [plan for plan in plans if plan.stage.label == label]
    if not found:
        labels = ", ".join(dict.fromkeys(plan.stage.label for plan in plans if plan.stage.label)) or "none"
        raise ExperimentError(f"no stage of this sweep is labelled {label!r}: its labels are {labels}.")
    timed = any(plan.stage.kind == "timing" for plan in found)
    return [plan for plan in plans if plan in found or (timed and plan.stage.control)]


def meant(known: dict[str, Parameter], name: str, value: Any) -> Any:
    """Return a value as the notebook's parameter of this name takes it; as it is where there is none."""
    return known[name].meant(value) if name in known else value


def settings(stage: Stage) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield (keys of the file, parameter, value) of all that a stage sets."""
    for name, value in stage.fixed.items():
        yield ("fixed",), name, value
    for name, values in stage.grid.items():
        for value in values:
            yield ("grid",), name, value


def check_points(name: str, plans: list[StagePlan]) -> None:
    """Refuse a sweep that holds a run twice, or none."""
    seen: set[str] = set()
    for point in (point for plan in plans for point in plan.points):
        if point.digest in seen:
            raise ExperimentError(f"sweep {name!r} holds the same run twice: {point.label} {point.parameters}")
        seen.add(point.digest)
    if not seen:
        raise ExperimentError(f"sweep {name!r} excludes every point of its grid.")


def short(value: Any) -> str:
    """Return a value as shown in names of runs."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


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
    weights = sorted(folder.rglob("*.safetensors*"))  # an index too: it says which files count
    files = [(str(item.relative_to(folder)), item.stat().st_size, item.stat().st_mtime_ns) for item in weights]
    return hashlib.sha256((folder / "config.json").read_bytes() + json.dumps(files).encode()).hexdigest()
