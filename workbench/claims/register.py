"""The register of claims, ``claims.yaml``: the numbers that the project says of itself, and the runs behind them. ::

    claims:
      memory-at-40:
        says: "At 40% of its experts, exact, `reference` takes {value} of stock's memory."
        sweep: quick                  # recorded in results/quick.runs.parquet
        where: {budget: "40%", tolerance: 0.0}      # parameters that pick its runs, all of them if left out
        metric: memory_ratio          # of each run; or a cell of a recorded table:
        # table: caches
        # row: {policy: lru}
        # column: hit_rate
        # pooled: "drop 50%"          # the metric of this configuration over the prompts of all runs (`pooled`)
        shown: ".0%"                  # a format, if not as tables show the metric
        machine: any                  # or quiet: a clock's, on a machine that does nothing else; or gpu
        within: 0.05                  # how far a rerun's value may be from it, relative
        holds: "<= 0.5"               # what is claimed, if it is more than a number; it may have failed
        gb: 5                         # of disk that running it takes
        quick: true                   # `emoe reproduce --quick` runs it
    open:
      fig-12: {says: "Whether ...", command: "emoe sweep sweeps/paper/5-scheduling.yaml", minutes: 60}

A claim's value is that of its run, beside its interval; of several runs their mean, beside their range.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from emoe_core.errors import ExperimentError, require_known
from workbench.claims.pooled import PROMPTS, SUMMARY, Tables, pooled_row
from workbench.metrics.show import show
from workbench.sweep.schema import Scalar
from workbench.sweep.yaml_file import read_yaml
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.results_file import RESULTS, SweepResults, read_results

REGISTER = Path(__file__).parents[2] / "claims.yaml"
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}


NOTEBOOK = "notebook"


class Picked(BaseModel):
    """Recorded runs of a sweep that have some parameters; ``notebook`` counts as one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sweep: str
    where: dict[str, Scalar] = Field(default_factory=dict)

    def runs(self, results: Results) -> list[RecordedRun]:
        """Return them; ExperimentError where none was recorded."""
        recorded = [run for run in results(self.sweep).runs if run.status == "FINISHED"]
        found = [run for run in recorded if has({NOTEBOOK: run.notebook, **run.parameters}, self.where)]
        if not found:
            raise ExperimentError(f"the results of sweep {self.sweep!r} have no run with {self.where}.")
        return found


@dataclass(frozen=True)
class Value:
    """A number and what it scatters between: its interval over prompts, or range over runs; NaN where not known."""

    value: float
    low: float = math.nan
    high: float = math.nan


class Claim(Picked):
    """See the module's text."""

    says: str
    metric: str = ""
    table: str = ""
    row: dict[str, Scalar] = Field(default_factory=dict)
    column: str = ""
    pooled: str = ""
    shown: str = ""
    machine: Literal["any", "quiet", "gpu"] = "any"
    within: float = Field(ge=0)
    holds: str = ""
    gb: float = Field(gt=0)
    quick: bool = False

    @model_validator(mode="after")
    def _names_one_value(self) -> Claim:
        if bool(self.metric) == bool(self.table and self.column) or (self.pooled and not self.metric):
            raise ValueError("give a metric, or table, row and column; pooled goes with a metric")
        return self

    @field_validator("holds")
    @classmethod
    def _is_a_comparison(cls, text: str) -> str:
        if text:
            _comparison(text)
        return text

    @property
    def name(self) -> str:
        """The metric or the column: what the catalogue knows it by."""
        return self.metric or self.column

    @property
    def source(self) -> str:
        """What of a run the value is, for people."""
        if self.pooled:
            return f"`{self.metric}` of {self.pooled!r} over the prompts of all its runs"
        return f"`{self.metric}`" if self.metric else f"`{self.column}` of table `{self.table}` where {self.row}"

    def tables_needed(self) -> list[str]:
        """Return the names of a run's tables that the value is made of."""
        return [SUMMARY, PROMPTS] if self.pooled else [self.table] if self.table else []

    def value_of(self, runs: Sequence[tuple[Mapping[str, float], Tables]]) -> Value:
        """Return the claimed value of runs, given the metrics and tables of each; NaN where one has it not."""
        if self.pooled:
            row = pooled_row([tables for _, tables in runs], self.pooled)
            return Value(*(float(row.get(self.metric + end, math.nan)) for end in ("", "_low", "_high")))
        values = [self._value_in(metrics, tables) for metrics, tables in runs]
        mean = math.fsum(values) / len(values)
        if len(values) > 1:
            return Value(mean, min(values), max(values))
        return Value(mean, *(runs[0][0].get(self.metric + end, math.nan) for end in ("_low", "_high")))

    def _value_in(self, metrics: Mapping[str, float], tables: Tables) -> float:
        if self.metric:
            return float(metrics.get(self.metric, math.nan))
        table = tables.get(self.table)
        rows = [] if table is None else [row for row in table.to_dict("records") if has(row, self.row)]
        return float(rows[0][self.column]) if len(rows) == 1 and self.column in rows[0] else math.nan

    def found(self, results: Results) -> Found:
        """Return what was recorded of it.

        Raises
        ------
        ExperimentError
            When nothing was, or a run lacks the value.
        """
        runs = self.runs(results)
        value = self.value_of([(run.metrics, run.tables) for run in runs])
        if math.isnan(value.value):
            raise ExperimentError(f"a recorded run of sweep {self.sweep!r} with {self.where} has no {self.name!r}.")
        return Found(self, tuple(runs), value)

    def text(self, value: float) -> str:
        """Return a value as people read it."""
        return format(value, self.shown) if self.shown else show(self.name, value)


@dataclass(frozen=True)
class Found:
    """A claim, its recorded runs and its value."""

    claim: Claim
    runs: tuple[RecordedRun, ...]
    value: Value

    @property
    def text(self) -> str:
        """The value as people read it."""
        return self.claim.text(self.value.value)

    @property
    def range_text(self) -> str:
        """What the value scatters between, as people read it; empty where nothing is known."""
        low, high = self.value.low, self.value.high
        return "" if math.isnan(low) or math.isnan(high) else f"{self.claim.text(low)} to {self.claim.text(high)}"

    @property
    def verdict(self) -> str:
        """Whether what is claimed holds of the recorded value: "holds", "failed", or empty for a mere number."""
        if not self.claim.holds:
            return ""
        compare, limit = _comparison(self.claim.holds)
        return "holds" if compare(self.value.value, limit) else "failed"

    @property
    def sentence(self) -> str:
        """The claim with its value."""
        return self.claim.says.replace("{value}", self.text).replace("{range}", self.range_text)


class Column(BaseModel):
    """A column of a rendered table: a parameter, or a metric with its format, or texts by a parameter's value.

    Of a recorded table, ``of`` picks the row that the metric is of, among those that are alike in the parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    param: str = ""
    metric: str = ""
    of: dict[str, Scalar] = Field(default_factory=dict)
    shown: str = ""
    interval: bool = False
    named: dict[str, str] = Field(default_factory=dict)


class Rows(Picked):
    """A table of pages: a row for each recorded run, each row of a table of theirs, or each label of all together.

    ``row`` is what the shown rows of a recorded table have.
    """

    columns: list[Column] = Field(min_length=1)
    table: str = ""
    row: dict[str, Scalar] = Field(default_factory=dict)
    pooled: bool = False
    labels: list[str] = Field(default_factory=list)


class Drawn(Picked):
    """A figure of the paper, drawn from recorded runs: all of them together."""

    title: str
    figure: Literal["memory", "interval", "skill"]
    labels: list[str] = Field(default_factory=list)


class Open(BaseModel):
    """What is still to be measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    says: str
    command: str
    minutes: float = Field(gt=0)


class Register(BaseModel):
    """All of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    claims: dict[str, Claim] = Field(default_factory=dict)
    tables: dict[str, Rows] = Field(default_factory=dict)
    figures: dict[str, Drawn] = Field(default_factory=dict)
    open: dict[str, Open] = Field(default_factory=dict)

    def claim(self, name: str) -> Claim:
        """Return a claim by name; OptionError, with the names that there are, where it is none."""
        require_known(name, self.claims, "claim")
        return self.claims[name]


class Results:
    """Recorded sweeps of a folder, each read once."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._read = cache(lambda sweep: read_results(sweep, folder))

    def __call__(self, sweep: str) -> SweepResults:
        """Return what is recorded of a sweep."""
        return self._read(sweep)


def read_register(path: Path = REGISTER) -> Register:
    """Return the register of a file.

    Raises
    ------
    ExperimentError
        When it is missing or says something that a register does not know.
    """
    if not path.is_file():
        raise ExperimentError(f"no register of claims at {path}: it lies in the project's folder.")
    try:
        return Register.model_validate(read_yaml(path))
    except ValidationError as error:
        problems = (f"  {'.'.join(str(key) for key in item['loc'])}: {item['msg']}" for item in error.errors())
        raise ExperimentError("\n".join([f"{path} is no register of claims:", *problems])) from None


def has(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a mapping has all the wanted values."""
    return all(name in values and values[name] == value for name, value in wanted.items())


def _comparison(text: str) -> tuple[Callable[[float, float], bool], float]:
    sign, _, limit = text.partition(" ")
    if sign not in COMPARISONS:
        raise ValueError(f"{text!r} is no comparison: write for example '<= 0.5'")
    return COMPARISONS[sign], float(limit)
