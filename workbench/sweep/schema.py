"""What a sweep file may say, as pydantic models; `sweep_file` reads one and says at which line it is wrong.

A sweep file names a sweep and its stages. A *stage* runs one notebook over points of its parameters: the whole `grid`,
or as many as a `search` may spend. ::

    name: quick
    description: Memory against quality on the reference model.
    stages:
      - notebook: notebooks/01_quickstart.ipynb
        kind: timing                  # one run at a time, machine to itself; `quality` runs may overlap
        fixed: {prompts: 16}
        grid: {budget: ["20%", "60%"], tolerance: [0.0, 1.0]}
        exclude: [{budget: "20%", tolerance: 0.0}]
        metrics: [peak_bytes, perplexity_ratio]   # shown as runs finish
        label: lossy                  # part of the runs' names, where stages of one notebook differ in what is fixed
        seconds_per_run: 60           # for the estimate, until the store knows better
        needs: {cores: 1, memory: 6GB, gpus: 1}   # what a run takes of a machine; gpus: 1 where there are GPUs, else 0
        needs_where:                  # runs that need something else, by their parameters; the last that fits counts
          - {where: {budget: "60%"}, memory: 8GB}

and in place of `grid` ::

        search:
          method: optuna              # or random: drawn at the start, needs no objectives
          runs: 30
          seed: 0
          space:
            budget: {low: 20, high: 100, step: 5, suffix: "%"}
            tolerance: {low: 0.0, high: 1.0}
            interval: {low: 1, high: 80, log: true}
            strategy: {values: [frequency, lru]}
          objectives: {memory_ratio: minimize, tpot_ratio: minimize, perplexity_ratio: minimize}

A file with a single stage may put these keys beside `name`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

Scalar = bool | int | float | str | None
DEFAULT_MEMORY_BYTES = 6_000_000_000  # a run of the embedded model in float32 with its libraries stays below it


def some(size: ByteSize) -> ByteSize:
    """Refuse no memory at all."""
    if size <= 0:
        raise ValueError("give more than 0 bytes, for example 6GB")
    return size


Memory = Annotated[ByteSize, AfterValidator(some)]


class Strict(BaseModel):
    """A part of a sweep file: no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Needs(Strict):
    """What one run takes of a machine; None in `gpus` stands for one where there are any."""

    cores: int = Field(default=1, ge=1)
    memory: Memory = ByteSize(DEFAULT_MEMORY_BYTES)
    gpus: int | None = Field(default=None, ge=0)


class NeedsWhere(Strict):
    """Needs of the runs that have the parameters `where`; what it leaves out stays as the stage has it."""

    where: dict[str, Scalar] = Field(min_length=1)
    cores: int | None = Field(default=None, ge=1)
    memory: Memory | None = None
    gpus: int | None = Field(default=None, ge=0)


class Values(Strict):
    """A parameter that is one of some values."""

    values: list[Scalar] = Field(min_length=1)

    @field_validator("values")
    @classmethod
    def _once_each(cls, values: list[Scalar]) -> list[Scalar]:
        return distinct(values)


class Range(Strict):
    """A number from `low` to `high`, whole when both are; with `suffix` it becomes a text such as ``"40%"``."""

    low: int | float
    high: int | float
    step: int | float | None = Field(default=None, gt=0)
    log: bool = Field(default=False, strict=False)  # yes and on are texts in YAML
    suffix: str = ""

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low ({self.low}) is not below high ({self.high})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log takes a low above 0 and no step")
        if self.whole and isinstance(self.step, float):
            raise ValueError(f"step {self.step} is not whole, but low and high are: write {float(self.low)}")
        return self

    @property
    def whole(self) -> bool:
        """Say whether the range holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def written(self, value: float) -> Scalar:
        """Return a number of the range as the notebook gets it."""
        number = int(value) if self.whole else float(value)
        return f"{number:g}{self.suffix}" if self.suffix else number


def form_of(axis: Any) -> str:
    """Return the form that an axis of a search is meant in, so that an error speaks of that form alone."""
    named = isinstance(axis, Values) or (isinstance(axis, dict) and "values" in axis)
    return "values" if named else "range"


Axis = Annotated[Annotated[Values, Tag("values")] | Annotated[Range, Tag("range")], Discriminator(form_of)]


class Search(Strict):
    """A search over the values of parameters, at most `runs` of them."""

    method: Literal["random", "optuna"]
    runs: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    space: dict[str, Axis] = Field(min_length=1)
    objectives: dict[str, Literal["minimize", "maximize"]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_something_to_seek(self) -> Search:
        if self.method == "optuna" and not self.objectives:
            raise ValueError("optuna needs objectives, for example {perplexity_ratio: minimize}")
        if self.method == "random" and self.objectives:
            raise ValueError("random does not use objectives; drop them or take method optuna")
        return self


class Stage(Strict):
    """One notebook over points of its parameters."""

    notebook: str
    kind: Literal["timing", "quality"]
    fixed: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    grid: dict[str, list[Scalar]] = Field(default_factory=dict)
    search: Search | None = None
    exclude: list[dict[str, Scalar]] = Field(default_factory=list)
    metrics: list[str] = Field(default_factory=list)
    label: str = ""
    seconds_per_run: float | None = Field(default=None, gt=0, strict=False)
    needs: Needs = Field(default_factory=Needs)
    needs_where: list[NeedsWhere] = Field(default_factory=list)

    @field_validator("grid")
    @classmethod
    def _axes_have_values(cls, grid: dict[str, list[Scalar]]) -> dict[str, list[Scalar]]:
        for name, values in grid.items():
            if not values:
                raise ValueError(f"axis {name!r} has no values")
            try:
                distinct(values)
            except ValueError as error:
                raise ValueError(f"axis {name!r} {error}") from None
        return grid

    @model_validator(mode="after")
    def _names_agree(self) -> Stage:
        if self.grid and self.search:
            raise ValueError("a stage has a grid or a search, not both")
        varied = set(self.grid) | set(self.search.space if self.search else ())
        twice = sorted(set(self.fixed) & varied)
        if twice:
            where = "in the search" if self.search else "on the grid"
            raise ValueError(f"both fixed and {where}: {', '.join(twice)}")
        for key, entries in (("exclude", self.exclude), ("needs_where", [item.where for item in self.needs_where])):
            unknown = sorted({name for entry in entries for name in entry} - set(self.fixed) - varied)
            if unknown:
                raise ValueError(f"{key} names parameters that the stage does not set: {', '.join(unknown)}")
        return self

    def read_by(self, meant: Callable[[str, Any], Any]) -> Stage:
        """Return the stage with every value of a parameter as ``meant(parameter, value)`` has it."""

        def each(values: dict[str, Any]) -> dict[str, Any]:
            return {name: meant(name, value) for name, value in values.items()}

        changes: dict[str, Any] = {
            "fixed": each(self.fixed),
            "grid": {name: [meant(name, value) for value in values] for name, values in self.grid.items()},
            "exclude": [each(entry) for entry in self.exclude],
            "needs_where": [item.model_copy(update={"where": each(item.where)}) for item in self.needs_where],
        }
        if self.search:
            space = {
                name: axis.model_copy(update={"values": [meant(name, value) for value in axis.values]})
                if isinstance(axis, Values)
                else axis
                for name, axis in self.search.space.items()
            }
            changes["search"] = self.search.model_copy(update={"space": space})
        return self.model_copy(update=changes)

    def excludes(self, parameters: dict[str, Any]) -> bool:
        """Say whether a point with these parameters is left out."""
        return any(all(parameters[n] == v for n, v in entry.items()) for entry in self.exclude)

    def needs_of(self, parameters: dict[str, Any]) -> Needs:
        """Return what a run with these parameters takes of a machine."""
        needs = self.needs
        for item in self.needs_where:
            if all(parameters.get(name) == value for name, value in item.where.items()):
                needs = needs.model_copy(update=item.model_dump(exclude={"where"}, exclude_none=True))
        return needs


class SweepFile(Strict):
    """A named list of stages."""

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


def distinct(values: list[Scalar]) -> list[Scalar]:
    """Return the values, refused when one is there twice."""
    if len({json.dumps(value) for value in values}) < len(values):
        raise ValueError("names a value twice")
    return values
