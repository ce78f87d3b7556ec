"""Points that Optuna proposes from the results of earlier ones (extra ``optuna``), towards a Pareto front by TPE.

There is no study besides the store: at the start, the finished runs of the search are told to a fresh study, so a
search resumes wherever its store is, and what MLflow shows is what the search knows. The sampler of every proposal is
seeded by the search's seed and the proposal's number: with one run at a time, an interrupted search that goes on
proposes the same points as one that was not. A point is run once, however often it is proposed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from emoe_core.errors import OptionError
from workbench.metrics.show import show, words_of
from workbench.sweep.points import Point, StagePlan, draw
from workbench.sweep.schema import Range, Scalar, Values
from workbench.tracking.runs import DIGEST_TAG, STUDY_TAG
from workbench.tracking.store import decode, recorded_metrics

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

PROPOSALS = 10  # of the sampler, before a point that is new is drawn at random
DRAWS = 500  # at random, before the space counts as used up


class OptunaSearch:
    """A stage's search.

    Parameters
    ----------
    plan : StagePlan
        A stage whose search has the method ``optuna``.
    known : iterable of (point, metrics)
        Finished runs of the same study, oldest first; they count as runs of this search.

    Raises
    ------
    OptionError
        When Optuna is not installed.
    """

    def __init__(self, plan: StagePlan, known: Iterable[tuple[Point, Mapping[str, float]]] = ()) -> None:
        assert plan.stage.search is not None and plan.study
        self._plan, self._search = plan, plan.stage.search
        self._optuna = import_optuna()
        self._study = self._new_study()
        self._space = {name: self._distribution(axis) for name, axis in self._search.space.items()}
        self._seen: set[str] = set()
        self._free = set(range(self._search.runs))
        self._trials: dict[str, Trial] = {}
        for point, metrics in known:
            self._remember(point, metrics)

    @property
    def left(self) -> int:
        """Return how many points may still be proposed."""
        return len(self._free)

    def ask(self) -> Point | None:
        """Propose a point; None when the runs are spent, or the space holds no other point."""
        if not self._free:
            return None
        place = min(self._free)
        for attempt in range(PROPOSALS):
            trial = self._propose(place, attempt)
            axes = {name: self._written(name, trial.params[name]) for name in self._space}
            point = self._plan.point(axes, place)
            if self._is_new(point):
                return self._accept(point, trial)
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        source = random.Random(f"{self._search.seed} {place}")
        for _ in range(DRAWS):
            point = self._plan.point({name: draw(axis, source) for name, axis in self._search.space.items()}, place)
            if self._is_new(point):
                self._study.enqueue_trial({name: self._internal(name, value) for name, value in point.axes.items()})
                return self._accept(point, self._study.ask(self._space))
        self._free.clear()
        return None

    def tell(self, point: Point, metrics: Mapping[str, float] | None) -> str | None:
        """Learn the objectives of a run, None when it failed; a run without them teaches nothing."""
        trial = self._trials.pop(point.digest)
        values = None if metrics is None else self._objectives(metrics)
        if values is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            if metrics is not None:
                missing = sorted(name for name in self._search.objectives if math.isnan(metrics.get(name, math.nan)))
                return (
                    f"{point.label} logged no number as metric {', '.join(missing)}: the search learns nothing from it."
                )
            return None
        self._study.tell(trial, values)
        return None

    def conclusion(self) -> list[str]:
        """Return the Pareto front as lines: the runs that no other run beats in every objective."""
        front = self._study.best_trials
        if not front:
            return []
        lines = [f"{len(front)} of {len(self._seen)} runs are on the Pareto front:"]
        for trial in front:
            axes = {name: self._written(name, value) for name, value in trial.params.items()}
            told = zip(self._search.objectives, trial.values, strict=True)
            values = ", ".join(f"{words_of(name)} {show(name, value)}" for name, value in told)
            lines.append(f"  {self._plan.point(axes, 0).label}: {values}")
        return lines

    def _new_study(self) -> Study:
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        directions = list(self._search.objectives.values())
        return self._optuna.create_study(directions=directions, sampler=self._sampler(0, 0))

    def _sampler(self, place: int, attempt: int) -> Any:
        seed = random.Random(f"{self._search.seed} {place} {attempt}").randrange(2**32)
        return self._optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def _propose(self, place: int, attempt: int) -> Trial:
        self._study.sampler = self._sampler(place, attempt)
        return self._study.ask(self._space)

    def _is_new(self, point: Point) -> bool:
        return point.digest not in self._seen and not point.stage.excludes(point.parameters)

    def _accept(self, point: Point, trial: Trial) -> Point:
        self._free.remove(point.index - self._plan.first)
        self._seen.add(point.digest)
        self._trials[point.digest] = trial
        return point

    def _remember(self, point: Point, metrics: Mapping[str, float]) -> None:
        """Take a finished run into the study, and its place as spent."""
        self._seen.add(point.digest)
        self._free.discard(point.index - self._plan.first)
        values = self._objectives(metrics)
        if values is not None:
            params = {name: self._internal(name, value) for name, value in point.axes.items()}
            trial = self._optuna.trial.create_trial(params=params, distributions=self._space, values=values)
            self._study.add_trial(trial)

    def _objectives(self, metrics: Mapping[str, float]) -> list[float] | None:
        values = [metrics.get(name, math.nan) for name in self._search.objectives]
        return None if any(math.isnan(value) for value in values) else values

    def _distribution(self, axis: Values | Range) -> BaseDistribution:
        kinds = self._optuna.distributions
        if isinstance(axis, Values):
            return kinds.CategoricalDistribution(axis.values)
        if axis.whole:
            return kinds.IntDistribution(axis.low, axis.high, log=axis.log, step=axis.step or 1)
        return kinds.FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)

    def _written(self, name: str, value: Any) -> Scalar:
        axis = self._search.space[name]
        return value if isinstance(axis, Values) else axis.written(value)

    def _internal(self, name: str, written: Any) -> Any:
        """Return a value as Optuna knows it, from what the notebook gets."""
        axis = self._search.space[name]
        if isinstance(axis, Values):
            return written
        number = float(str(written).removesuffix(axis.suffix)) if axis.suffix else float(written)
        number = min(max(number, axis.low), axis.high)  # a suffix comes with six digits
        return int(number) if axis.whole else number


def import_optuna() -> Any:
    """Return the module, or say how to install it."""
    try:
        import optuna
    except ImportError:
        raise OptionError("method: optuna needs Optuna: pip install -c constraints.txt -e '.[optuna]'") from None
    return optuna


def known_points(plan: StagePlan, runs: Iterable[MlflowRun]) -> list[tuple[Point, dict[str, float]]]:
    """Return the finished runs of a study as points with their metrics, oldest first.

    A run whose digest is not what its parameters come to today, because its model changed, is left out.
    """
    assert plan.stage.search is not None
    known: list[tuple[Point, dict[str, float]]] = []
    for run in sorted(runs, key=lambda item: item.info.start_time):
        tags, params = run.data.tags, run.data.params
        if run.info.status != "FINISHED" or tags.get(STUDY_TAG) != plan.study:
            continue
        axes = {name: decode(params[name]) for name in plan.stage.search.space if name in params}
        point = plan.point(axes, len(known))
        if point.digest == tags.get(DIGEST_TAG):
            known.append((point, recorded_metrics(run)))
    return known
