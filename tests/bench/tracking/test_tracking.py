from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from sweep_bench import Bench

from emoe_core.errors import ExperimentError
from workbench.tracking import results
from workbench.tracking import run as tracking
from workbench.tracking.place import HOME_VARIABLE, project_root, store_dir, store_uri, ui_command
from workbench.tracking.store import decode, encode, experiment_id, open_store
from workbench.tracking.store_errors import disk_reason


def test_a_run_by_hand_is_recorded_and_finishes(bench: Bench) -> None:
    params = {"budget": "40%", "seed": 7, "tasks": ("qa", "code")}
    with tracking.run("by hand", "first", params=params, tags={"who": "me"}, model_hash="m", data_hash="d") as run:
        run.log_metrics({"peak_bytes": 5, "kl_nats": np.float32(0.5), "left_out": None})
        run.log_frame("requests", pd.DataFrame({"ttft_s": [0.1, 0.2]}))
        figure = Figure()
        figure.subplots().plot([1, 2])
        assert run.log_figure("line", figure) is figure
    recorded = open_store().get_run(run.run_id)
    assert recorded.info.status == "FINISHED" and recorded.info.run_name == "first"
    assert recorded.data.metrics == {"peak_bytes": 5.0, "kl_nats": 0.5}
    assert {name: decode(text) for name, text in recorded.data.params.items()} == params | {"tasks": ["qa", "code"]}
    assert recorded.data.tags["who"] == "me"
    environment = json.loads(Path(open_store().download_artifacts(run.run_id, "environment.json")).read_text())
    assert (environment["seed"], environment["model_hash"], environment["data_hash"]) == (7, "m", "d")
    assert results.artifact_frame(run.run_id, "requests")["ttft_s"].tolist() == [0.1, 0.2]
    with pytest.raises(ExperimentError, match="has no table 'absent'"):
        results.artifact_frame(run.run_id, "absent")


def test_artifacts_lie_under_the_project_root(bench: Bench) -> None:
    with tracking.run("by hand", "first") as run:
        run.log_text("note.txt", "text")
    assert [path.read_text() for path in (bench.root / "mlruns" / "artifacts").rglob("note.txt")] == ["text"]


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_ends_early_says_how(bench: Bench, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), tracking.run("by hand", "first") as run:
        raise error
    assert open_store().get_run(run.run_id).info.status == status


def test_within_a_sweep_the_sweeps_run_is_continued_and_left_open(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = tracking.new_run(open_store(), "a sweep", "point")
    open_store().log_param(run_id, "budget", encode("40%"))
    monkeypatch.setenv(tracking.RUN_VARIABLE, run_id)
    with tracking.run("elsewhere", "ignored", params={"budget": "60%", "seed": 1}) as run:
        pass
    recorded = open_store().get_run(run_id)
    assert run.run_id == run_id and recorded.info.status == "RUNNING"
    assert recorded.data.params == {"budget": "40%", "seed": "1"}
    assert open_store().get_experiment_by_name("elsewhere") is None


@pytest.mark.parametrize("value", ["many", [1, 2], {"a": 1}])
def test_a_metric_that_is_no_number_is_refused(bench: Bench, value: object) -> None:
    with pytest.raises(ExperimentError, match="a metric is one number"), tracking.run("by hand", "first") as run:
        run.log_metrics({"loads": value})  # type: ignore[dict-item]


def test_a_deleted_experiment_is_named_with_the_way_out(bench: Bench) -> None:
    client = open_store()
    client.delete_experiment(experiment_id(client, "gone"))
    with pytest.raises(ExperimentError, match="mlflow gc"):
        experiment_id(client, "gone")


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(scalars | st.lists(scalars, max_size=3))
def test_parameters_come_back_with_their_type(value: object) -> None:
    assert decode(encode(value)) == value
    assert type(decode(encode(value))) is type(value)


@given(st.sampled_from(["reference", "40%", "3 slots", "float32", "/a/b"]))
def test_plain_words_are_stored_as_they_are(value: str) -> None:
    assert encode(value) == value


def test_the_project_root_is_the_nearest_project_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    inner = tmp_path / "project" / "notebooks"
    inner.mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    monkeypatch.chdir(inner)
    assert project_root() == tmp_path / "project"
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "chosen"))
    assert project_root() == tmp_path / "chosen"
    assert store_uri() == f"sqlite:///{tmp_path / 'chosen' / 'mlruns' / 'mlflow.db'}"
    assert store_uri() in ui_command()


def test_a_place_that_cannot_hold_a_store_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ExperimentError, match=HOME_VARIABLE):
        store_dir()


def test_errors_of_a_full_disk_are_told_from_others() -> None:
    assert disk_reason("OSError: [Errno 28] No space left on device: 'x'") == "no space left on device"
    assert disk_reason("(sqlite3.OperationalError) database or disk is full") == "database or disk is full"
    assert disk_reason("KeyError: 'x'") is None


@pytest.mark.long
def test_two_processes_may_open_a_new_store_at_once(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "from workbench.tracking.store import open_store; print(len(open_store().search_experiments()))"
    environment = {**os.environ, HOME_VARIABLE: str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["1", "1"]
    assert stat.S_ISREG((tmp_path / "mlruns" / "mlflow.db").stat().st_mode)
