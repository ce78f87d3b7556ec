"""The points of a sweep: which runs a sweep file stands for, and what identifies each.

Parameters are checked against the notebook's cell tagged ``parameters``: unknown names and wrong types are refused
before anything runs, because papermill itself only warns, and so are values that the bench knows to be impossible.
Points of a grid and of a random search are known at the start; those of an Optuna search come one by one
(`sweep_search`). Nothing is run here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from emoe_core.errors import ExperimentError
from workbench.models.reference import EMBEDDED, RECIPES
from workbench.sweep.file import SweepSource
from workbench.sweep.schema import Needs, Range, Scalar, Search, Stage, Values
from workbench.sweep.values import check_parameter, check_value
from workbench.tracking.notebook import Parameter, find_notebook, notebook_parameters, source_hash

MODEL_PARAMETER = "model"
MAX_POINTS = 10_000
DRAWS_WITHOUT_NEWS = 1000  # that many repeated draws mean that a random search has seen its whole space


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
    study : str
        Identity of the Optuna search that proposed the point, empty for a point of a grid or a random search.
    """

    stage: Stage
    notebook: Path
    parameters: dict[str, Any]
    axes: dict[str, Any]
    digest: str
    index: int = 0
    study: str = ""

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
    """

    stage: Stage
    notebook: Path
    source: str
    model: Any
    first: int

    def point(self, axes: dict[str, Any], place: int) -> Point:
        """Return the run with these values at a place within the stage."""
        parameters = {**self.stage.fixed, **axes}
        digest = point_digest(self.source, parameters, parameters.get(MODEL_PARAMETER, self.model))
        return Point(self.stage, self.notebook, parameters, axes, digest, self.first + place, self.study)

    @cached_property
    def study(self) -> str:
        """Return the identity of the stage's Optuna search: all that its results depend on but the number of runs."""
        search = self.stage.search
        if search is None or search.method != "optuna":
            return ""
        asked = search.model_dump(exclude={"runs"})
        parts = [self.source, self.stage.fixed, self.stage.exclude, asked, model_state(self.model)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def points(self) -> list[Point]:
        """Return the runs that are known at the start: all but those of an Optuna search."""
        search = self.stage.search
        if search is None:
            if math.prod(len(axis) for axis in self.stage.grid.values()) > MAX_POINTS:
                raise ExperimentError(f"a grid has more than {MAX_POINTS:,} points: leave out some values, or search.")
            found: Iterator[dict[str, Any]] = (
                dict(zip(self.stage.grid, values, strict=True))
                for values in itertools.product(*self.stage.grid.values())
            )
        else:
            found = iter([] if search.method == "optuna" else random_draws(self.stage, search))
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
        first += stage.search.runs if plan.study and stage.search else len(plan.points)
    check_points(sweep.file.name, plans)
    return plans


def meant(known: dict[str, Parameter], name: str, value: Any) -> Any:
    """Return a value as the notebook's parameter of this name takes it; as it is where there is none."""
    return known[name].meant(value) if name in known else value


def settings(stage: Stage) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield (keys of the file, parameter, value) of all that a stage sets; of a range its ends."""
    for name, value in stage.fixed.items():
        yield ("fixed",), name, value
    for name, values in stage.grid.items():
        for value in values:
            yield ("grid",), name, value
    for name, axis in stage.search.space.items() if stage.search else ():
        ends = axis.values if isinstance(axis, Values) else [axis.written(axis.low), axis.written(axis.high)]
        for value in ends:
            yield ("search", "space"), name, value


def check_points(name: str, plans: list[StagePlan]) -> None:
    """Refuse a sweep that holds a run twice, or none."""
    seen: set[str] = set()
    for point in (point for plan in plans for point in plan.points):
        if point.digest in seen:
            raise ExperimentError(f"sweep {name!r} holds the same run twice: {point.label} {point.parameters}")
        seen.add(point.digest)
    if not seen and not any(plan.study for plan in plans):
        raise ExperimentError(f"sweep {name!r} excludes every point of its grid.")


def random_draws(stage: Stage, search: Search) -> list[dict[str, Scalar]]:
    """Return `runs` different points of the space, the same ones for the same seed; a larger `runs` adds to them.

    Raises
    ------
    ExperimentError
        When the space does not hold as many.
    """
    source = random.Random(search.seed)
    drawn: dict[str, dict[str, Scalar]] = {}
    in_vain = 0
    while len(drawn) < search.runs:
        axes = {name: draw(axis, source) for name, axis in search.space.items()}
        key = json.dumps(axes)
        if key in drawn or stage.excludes({**stage.fixed, **axes}):
            in_vain += 1
            if in_vain > DRAWS_WITHOUT_NEWS:
                raise ExperimentError(
                    f"the search over {stage.notebook} finds only {len(drawn)} different points, not {search.runs}: "
                    f"set runs to {len(drawn)}, or use a grid."
                )
            continue
        in_vain = 0
        drawn[key] = axes
    return list(drawn.values())


def draw(axis: Values | Range, source: random.Random) -> Scalar:
    """Return one value of an axis, evenly: of a logarithmic range its logarithm."""
    if isinstance(axis, Values):
        return source.choice(axis.values)
    if axis.log:
        value = math.exp(source.uniform(math.log(axis.low), math.log(axis.high)))
        return axis.written(min(max(round(value) if axis.whole else value, axis.low), axis.high))
    step = axis.step or (1 if axis.whole else None)
    if step is None:
        return axis.written(source.uniform(axis.low, axis.high))
    count = math.floor((axis.high - axis.low) / step + 1e-9)
    return axis.written(axis.low + step * source.randint(0, count))


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
