from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sweep_bench import NOTEBOOK, Bench
from test_sweep_file import write

from emoe_core.errors import ExperimentError
from workbench.sweep.file import read_sweep
from workbench.sweep.plan import describe_plan
from workbench.sweep.points import Point, StagePlan, plan_stages
from workbench.sweep.run import run_sweep
from workbench.sweep.search import OptunaSearch, known_points
from workbench.tracking.place import HOME_VARIABLE
from workbench.tracking.runs import DIGEST_TAG, STUDY_TAG
from workbench.tracking.store import encode

pytest.importorskip("optuna", reason="Optuna is not installed (extra `optuna`)")
SPACE = {"tolerance": {"low": 0.0, "high": 1.0}, "budget": {"low": 20, "high": 100, "step": 5, "suffix": "%"}}
BOTH = {"memory": "minimize", "quality": "maximize"}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    return tmp_path


def plan(folder: Path, **search: Any) -> StagePlan:
    wanted = {"method": "optuna", "runs": 12, "space": SPACE, "objectives": BOTH} | search
    content = {"name": "s", "notebook": str(NOTEBOOK), "kind": "quality", "search": wanted}
    return plan_stages(read_sweep(write(folder, content)))[0]


def measure(point: Point) -> dict[str, float]:
    share = float(point.axes["budget"].rstrip("%")) / 100
    return {"memory": share, "quality": share - point.axes["tolerance"]}


def recorded(point: Point, number: int, metrics: dict[str, float], status: str = "FINISHED") -> Any:
    """Return a run as MLflow hands it back."""
    tags = {DIGEST_TAG: point.digest, STUDY_TAG: point.study}
    params = {name: encode(value) for name, value in point.parameters.items()}
    info = SimpleNamespace(status=status, start_time=number)
    return SimpleNamespace(info=info, data=SimpleNamespace(tags=tags, params=params, metrics=metrics))


def carry_on(search: OptunaSearch, most: int = 100) -> list[Point]:
    found: list[Point] = []
    while len(found) < most and (point := search.ask()):
        assert search.tell(point, measure(point)) is None
        found.append(point)
    return found


def test_a_search_that_was_interrupted_goes_on_as_one_that_was_not(project: Path) -> None:
    stage = plan(project)
    whole = carry_on(OptunaSearch(stage))
    assert len(whole) == 12
    begun = carry_on(OptunaSearch(stage), most=7)
    runs = [recorded(point, number, measure(point)) for number, point in enumerate(begun)]
    killed = recorded(whole[7], 7, {}, "KILLED")
    resumed = OptunaSearch(stage, known_points(stage, [killed, *reversed(runs)]))
    assert resumed.left == 5
    rest = carry_on(resumed)
    assert [p.axes for p in [*begun, *rest]] == [p.axes for p in whole]
    assert [p.index for p in rest] == [7, 8, 9, 10, 11]
    other = carry_on(OptunaSearch(plan(project, seed=1)))
    assert [p.axes for p in other] != [p.axes for p in whole]


def test_the_search_learns(project: Path) -> None:
    one = {"tolerance": {"low": 0.0, "high": 1.0}}
    search = OptunaSearch(plan(project, runs=40, space=one, objectives={"loss": "minimize"}))
    seen = []
    while point := search.ask():
        seen.append(point.axes["tolerance"])
        search.tell(point, {"loss": (point.axes["tolerance"] - 0.3) ** 2})
    assert sum(abs(x - 0.3) for x in seen[-10:]) < sum(abs(x - 0.3) for x in seen[:10]) / 2


def test_the_conclusion_is_the_pareto_front(project: Path) -> None:
    search = OptunaSearch(plan(project))
    points = carry_on(search)
    scores = [(m["memory"], -m["quality"]) for m in map(measure, points)]
    front = {
        point.label
        for point, mine in zip(points, scores, strict=True)
        if not any(o != mine and o[0] <= mine[0] and o[1] <= mine[1] for o in scores)
    }
    first, *lines = search.conclusion()
    assert first.startswith(f"{len(front)} of 12 runs")
    assert {line.strip().split(": ")[0] for line in lines} == front


def test_no_point_is_proposed_twice_and_a_space_ends(project: Path) -> None:
    small = {"tolerance": {"values": [0.0, 1.0]}, "seed": {"low": 1, "high": 3}}
    search = OptunaSearch(plan(project, runs=50, space=small, objectives={"loss": "minimize"}))
    found = []
    while point := search.ask():
        found.append(point.digest)
        search.tell(point, {"loss": 1.0})
    assert len(found) == len(set(found)) == 6 and search.left == 0


def test_runs_without_the_objectives_or_that_failed_teach_nothing(project: Path) -> None:
    search = OptunaSearch(plan(project, runs=2))
    first, second = search.ask(), search.ask()
    assert first and second and search.ask() is None
    assert "logged no number as metric quality" in (search.tell(first, {"memory": 1.0}) or "")
    assert search.tell(second, None) is None
    assert search.conclusion() == []


def test_an_objective_that_is_no_number_teaches_nothing_and_says_so(project: Path) -> None:
    stage = plan(project, runs=3)
    search = OptunaSearch(stage)
    point = search.ask()
    assert point is not None
    metrics = measure(point) | {"quality": math.nan}
    assert "logged no number as metric quality" in (search.tell(point, metrics) or "")
    resumed = OptunaSearch(stage, known_points(stage, [recorded(point, 0, metrics)]))
    assert resumed.conclusion() == [] and resumed.left == 2


def test_points_of_another_notebook_space_or_seed_do_not_count(project: Path) -> None:
    stage = plan(project)
    point = OptunaSearch(stage).ask()
    assert point
    run = recorded(point, 0, measure(point))
    assert len(known_points(plan(project, runs=99), [run])) == 1, "more runs are the same search"
    assert known_points(plan(project, seed=1), [run]) == []
    assert known_points(plan(project, objectives={"memory": "minimize"}), [run]) == []


def test_random_points_are_seeded_distinct_and_grow(project: Path) -> None:
    def drawn(**change: Any) -> list[dict[str, Any]]:
        return [p.axes for p in plan(project, method="random", objectives={}, **change).points]

    six = drawn(runs=6)
    assert six == drawn(runs=9)[:6] != drawn(runs=6, seed=1)
    assert all(0 <= axes["tolerance"] <= 1 and int(axes["budget"].rstrip("%")) % 5 == 0 for axes in six)
    whole = drawn(runs=40, space={"prompts": {"low": 1, "high": 64, "log": True}})
    assert sorted(axes["prompts"] for axes in whole)[0] >= 1 and len({a["prompts"] for a in whole}) == 40
    with pytest.raises(ExperimentError, match="only 3 different points, not 5: set runs to 3"):
        drawn(runs=5, space={"seed": {"low": 1, "high": 3}})


@pytest.mark.parametrize(
    ("change", "line", "complaint"),
    [
        ("runs: 0", 9, "greater than or equal to 1"),
        ("method: grid", 9, "'random' or 'optuna'"),
        ("objectives: {}", 9, "optuna needs objectives"),
        ("space: {tolerance: {low: 1.0, high: 0.0}}", 9, "low (1.0) is not below high (0.0)"),
        ("space: {tolerance: {low: 0, high: 1, log: true}}", 9, "log takes a low above 0"),
        ("space: {bugdet: {values: [1]}}", 9, "no parameter 'bugdet'"),
        ("space: {budget: {low: 1, high: 9}}", 9, "parameter 'budget' is 1 (int)"),
        ("space: {tolerance: {lo: 1.0, high: 0.0}}", 9, "lo: unknown key"),
    ],
)
def test_a_search_says_at_which_line_it_is_wrong(project: Path, change: str, line: int, complaint: str) -> None:
    name = change.split(":")[0]
    given = {
        "method": "optuna",
        "runs": "4",
        "space": "{tolerance: {low: 0.0, high: 1.0}}",
        "objectives": "{a: minimize}",
    }
    lines = [f"      {key}: {value}" for key, value in given.items() if key != name]
    text = f"name: s\nstages:\n  - notebook: {NOTEBOOK}\n    kind: quality\n    search:\n" + "\n".join(lines)
    with pytest.raises(ExperimentError) as error:
        plan_stages(read_sweep(write(project, f"{text}\n      {change}\n")))
    assert complaint in str(error.value)
    assert f"sweep.yaml:{line if name != 'objectives' else 5}:" in str(error.value)


@pytest.mark.long
def test_a_search_runs_resumes_and_shows_its_front(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    def search(runs: int) -> Path:
        goals = {"peak_bytes": "minimize", "perplexity_ratio": "minimize"}
        return bench.write(grid={}, search={"method": "optuna", "runs": runs, "space": SPACE, "objectives": goals})

    first = run_sweep(search(1), jobs=1)
    more = run_sweep(search(2), jobs=1)
    assert (len(first.finished), len(more.finished)) == (1, 1)
    assert more.skipped == first.finished and first.parent_run_id == more.parent_run_id
    assert bench.statuses() == ["FINISHED", "FINISHED"]
    assert "on the Pareto front" in capsys.readouterr().err
    assert [run.finished for run in describe_plan(search(3)).runs] == [True, True, False]
