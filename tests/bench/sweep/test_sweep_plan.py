"""What a dry run foresees: how long runs take, metrics that nobody records, and values that no run could use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep_bench import NOTEBOOK, Bench

from emoe_core.errors import ExperimentError
from workbench.sweep.plan import describe_plan
from workbench.sweep.values import check_value
from workbench.tracking.run import new_run
from workbench.tracking.runs import NOTEBOOK_TAG
from workbench.tracking.store import encode, open_store


def record(seconds: float, metrics: tuple[str, ...] = ("peak_bytes",), **parameters: Any) -> None:
    """Store a finished run of the dummy notebook that took so long."""
    client = open_store()
    run_id = new_run(client, "earlier", "a run", tags={NOTEBOOK_TAG: NOTEBOOK.stem})
    for name, value in parameters.items():
        client.log_param(run_id, name, encode(value))
    for name in metrics:
        client.log_metric(run_id, name, 1.0)
    started = client.get_run(run_id).info.start_time
    client.set_terminated(run_id, "FINISHED", end_time=started + int(1000 * seconds))


def expected(path: Path) -> list[float | None]:
    return [run.expected_s for run in describe_plan(path).runs]


def test_runs_with_the_same_settings_tell_best_how_long_one_takes(bench: Bench) -> None:
    unknown = bench.write(grid={"seed": [1]}, fixed={"prompts": 16})
    assert expected(unknown) == [None]
    record(10, prompts=4, budget="60%")
    assert expected(unknown) == [10], "another setting of the notebook is better than nothing"
    stated = bench.write(grid={"seed": [1]}, fixed={"prompts": 16}, seconds_per_run=70)
    assert expected(stated) == [70], "but the sweep file knows its own settings better"
    record(40, prompts=16, budget="60%")
    record(60, prompts=16, budget="20%")
    assert expected(stated) == [50], "runs with them know best"


def test_metrics_that_runs_like_these_do_not_record_are_warned_of(bench: Bench) -> None:
    path = bench.write(grid={"seed": [1]}, fixed={"prompts": 16}, metrics=["peek_bytes", "peak_bytes", "zzz"])
    assert describe_plan(path).warnings == [], "nothing is known yet"
    record(1, ("other",), prompts=4)
    assert describe_plan(path).warnings == [], "other settings may record something else"
    record(1, ("peak_bytes", "slot_bytes"), prompts=16)
    misspelt, absent = describe_plan(path).warnings
    assert "'peek_bytes'. Did you mean 'peak_bytes'" in misspelt
    assert absent.endswith("recorded the metric 'zzz'.")


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("budget", "abc", "cannot understand the budget"),
        ("budget", "120%", "more than all experts"),
        ("budgets", "60%, 40", "has no unit"),
        ("tolerance", 1.5, "must lie in"),
        ("strategy", "freqency", "unknown strategy 'freqency'"),
        ("arms", "frequency,best", "unknown strategy 'best'"),
        ("interval", 0, "interval"),
        ("intervals", "1,sometimes", "interval is 'sometimes'"),
        ("mix", "random", "random"),
        ("mixes", "sticky,none", "none"),
        ("dtype", "float99", "unknown dtype"),
        ("n_prompts", 0, "n_prompts"),
        ("errors", "0.5,1.5", "between 0 and 1"),
        ("model", "referense", "did you mean 'reference'"),
        ("model", "/nonexistent/model", "/nonexistent/model does not exist"),
        ("device", "gpu", "unknown device 'gpu'"),
        ("timing_dtype", "x", "unknown dtype 'x'"),
    ],
)
def test_values_that_no_run_could_use_are_refused(name: str, value: Any, complaint: str) -> None:
    with pytest.raises(ExperimentError, match=f"(?i)parameter {name!r}: .*{complaint}"):
        check_value({"model": None, name: None}, name, value)  # type: ignore[dict-item]
    if name != "model":
        check_value({name: None}, name, value)  # type: ignore[dict-item]  # a notebook of something else


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", "300MB"),
        ("budgets", "3 slots,40%"),
        ("strategy", "oracle"),
        ("intervals", "1, 8"),
        ("errors", "0,0.5"),
        ("source", "fixture"),
        ("expert_dtypes", "auto,int8"),
        ("budget", None),
        ("tried", "anything"),
        ("model", "carved"),
        ("model", "tiny"),
        ("model", "owner/name"),
        ("model", "../models/relative"),
        ("device", "cuda:1"),
    ],
)
def test_values_that_runs_use_are_taken(name: str, value: Any) -> None:
    check_value({"model": None, name: None}, name, value)  # type: ignore[dict-item]


def test_an_impossible_value_is_told_with_its_line(bench: Bench) -> None:
    path = bench.root / "typo.yaml"
    notebook = str(Path(__file__).parents[3] / "notebooks" / "01_quickstart.ipynb")
    stage = {"notebook": notebook, "kind": "quality", "grid": {"budget": ["60%", "abc"]}}
    path.write_text(yaml.safe_dump({"name": "typo"} | stage, sort_keys=False))
    with pytest.raises(ExperimentError, match=r"typo\.yaml:\d+: parameter 'budget': cannot understand"):
        describe_plan(path)
