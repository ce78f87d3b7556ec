"""Metrics that are infinite or no number are read and shown as such, wherever a recorded run is read."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric

from workbench.compare.runs import compare_runs
from workbench.metrics.show import column_texts, show
from workbench.tracking.place import HOME_VARIABLE
from workbench.tracking.record import RunRecord
from workbench.tracking.results import frame_of
from workbench.tracking.store import open_store, recorded_metrics

LOGGED = {"kl_nats": math.inf, "perplexity_ratio": -math.inf, "hit_rate": math.nan, "peak_bytes": 1e300}


@pytest.fixture
def run(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    shutil.copytree(empty_store / "mlruns", tmp_path / "mlruns")
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    client = open_store()
    made = client.create_run("0").info.run_id
    client.log_batch(made, metrics=[Metric(name, value, 0, 0) for name, value in LOGGED.items()])
    client.set_terminated(made)
    return client.get_run(made)


def assert_as_logged(found: dict[str, float]) -> None:
    assert {name: str(found[name]) for name in LOGGED} == {name: str(value) for name, value in LOGGED.items()}


def test_a_run_that_is_read_back_has_the_metrics_that_were_logged(run: Any) -> None:
    assert_as_logged(recorded_metrics(run))
    assert_as_logged(RunRecord.of(open_store(), run).metrics)
    (row,) = frame_of([run]).to_dict("records")
    assert_as_logged({str(name): value for name, value in row.items() if name in LOGGED})


@pytest.mark.parametrize("name", ["kl_nats", "peak_bytes", "read_bytes_per_s", "duration_s", "hit_rate", "loads"])
@pytest.mark.parametrize(
    ("value", "text"), [(math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "–"), (None, "–")], ids=str
)
def test_what_is_no_finite_number_is_shown_without_a_unit(name: str, value: float | None, text: str) -> None:
    assert show(name, value) == text
    _, texts = column_texts(name, [value, 2.0])
    assert texts[0] == text and texts[1] != text


def test_a_comparison_says_of_which_metrics_it_can_state_no_difference(run: Any) -> None:
    client = open_store()
    other = client.create_run("0").info.run_id
    for name, value in {"kl_nats": 0.5, "perplexity_ratio": -math.inf, "hit_rate": 0.5, "peak_bytes": 2e300}.items():
        client.log_metric(other, name, value)
    client.set_terminated(other)
    a, b = (RunRecord.of(client, item) for item in (run, client.get_run(other)))
    found = compare_runs(a, b)
    assert [change.metric for change in found.single] == ["peak_bytes"]
    assert "kl: inf in A, 0.5 nats in B; the difference is no number." in found.remarks
    assert not any("perplexity" in remark for remark in found.remarks), "it is the same in both"
