"""What a sweep file may say, as pydantic models; `sweep_file` reads one and says at which line it is wrong.

A sweep file names a sweep and its stages. A *stage* runs one notebook over all points of a grid of its parameters. ::

    name: quick
    description: Memory against quality on the reference model.
    stages:
      - notebook: notebooks/01_quickstart.ipynb
        kind: timing                  # one run at a time, machine to itself; `quality` runs may overlap
        fixed: {prompts: 16}
        grid: {budget: ["20%", "60%"], tolerance: [0.0, 1.0]}
        exclude: [{budget: "20%", tolerance: 0.0}]
        metrics: [peak_bytes, perplexity_ratio]   # shown as runs finish
        control: true                 # of kind timing: one run, done again at the end of the sweep; the listed metrics
                                      # say how far the machine drifted meanwhile
        label: lossy                  # part of the runs' names, where stages of one notebook differ in what is fixed
        seconds_per_run: 60           # for the estimate, until the store knows better
        needs: {cores: 1, memory: 6GB, gpus: 1}   # what a run takes of a machine; gpus: 1 where there are GPUs, else 0
        needs_where:                  # runs that need something else, by their parameters; the last that fits counts
          - {where: {budget: "60%"}, memory: 8GB}

A file with a single stage may put these keys beside `name`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from emoe_core.errors import ExperimentError

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


class Stage(Strict):
    """One notebook over points of its parameters."""

    notebook: str
    kind: Literal["timing", "quality"]
    fixed: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    grid: dict[str, list[Scalar]] = Field(default_factory=dict)
    exclude: list[dict[str, Scalar]] = Field(default_factory=list)
    metrics: list[str] = Field(default_factory=list)
    control: bool = False
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
        if self.control and (self.kind != "timing" or self.grid or not self.metrics):
            raise ValueError("a control is of kind timing, has no grid, and lists the metrics that tell of drift")
        twice = sorted(set(self.fixed) & set(self.grid))
        if twice:
            raise ValueError(f"both fixed and on the grid: {', '.join(twice)}")
        for key, entries in (("exclude", self.exclude), ("needs_where", [item.where for item in self.needs_where])):
            unknown = sorted({name for entry in entries for name in entry} - set(self.fixed) - set(self.grid))
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

    def with_fixed(self, given: Mapping[str, Scalar]) -> SweepFile:
        """Return the sweep with these values in place of what its stages fix; ExperimentError where none fixes one."""
        fixed = {name for stage in self.stages for name in stage.fixed}
        unknown = sorted(set(given) - fixed)
        if unknown:
            raise ExperimentError(
                f"no stage of sweep {self.name!r} fixes {', '.join(unknown)}, so it cannot be set. Fixed are: "
                f"{', '.join(sorted(fixed)) or 'none'}."
            )
        stages = [
            stage.model_copy(
                update={"fixed": stage.fixed | {name: value for name, value in given.items() if name in stage.fixed}}
            )
            for stage in self.stages
        ]
        # Of a path or a hub id its last part.
        words = [re.sub(r"[^A-Za-z0-9_.]+", "_", str(value).rpartition("/")[2]).strip("_.") for value in given.values()]
        return self.model_copy(update={"name": "-".join([self.name, *words]), "stages": stages})


def distinct(values: list[Scalar]) -> list[Scalar]:
    """Return the values, refused when one is there twice."""
    if len({json.dumps(value) for value in values}) < len(values):
        raise ValueError("names a value twice")
    return values
