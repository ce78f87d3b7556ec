"""Integration: sweeps over a real notebook, in real kernels, into a real MLflow store."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import yaml
from rich.console import Console
from sweep_bench import NOTEBOOK, Bench, wait_for

from emoe_core.errors import ExperimentError, OptionError
from workbench.report.sweep_page import read_sweep_page
from workbench.sweep.resume import is_alive, owner_tag
from workbench.sweep.run import run_sweep
from workbench.tracking import results
from workbench.tracking.place import HOME_VARIABLE
from workbench.tracking.run import new_run
from workbench.tracking.runs import ERROR_TAG, OWNER_TAG, drift_of, find_parent
from workbench.tracking.store import locked, open_store
from workbench.tracking.view import VIEW_TAG, view_address

# One worker runs all of these: they share one sweep that takes a while, and the machine.


@pytest.fixture
def in_swept(swept: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv(HOME_VARIABLE, str(swept.root))
    return swept


def read_artifact(run_id: str, path: str) -> bytes:
    return Path(open_store().download_artifacts(run_id, path)).read_bytes()


def test_a_failed_run_does_not_stop_the_sweep_and_the_exit_code_tells(in_swept: Bench) -> None:
    assert in_swept.statuses() == ["FAILED", "FINISHED", "FAILED"]
    assert in_swept.answer.returncode == 1
    assert "Traceback" not in in_swept.answer.stderr
    assert find_parent(open_store()).info.status == "FAILED"


def test_a_sweep_leaves_a_view_of_its_runs_and_names_its_address(in_swept: Bench) -> None:
    client = open_store()
    experiment = client.get_experiment(find_parent(client).info.experiment_id)
    assert VIEW_TAG in experiment.tags
    assert view_address(experiment.experiment_id) in in_swept.answer.stderr


def test_a_failed_run_keeps_its_reason_and_its_notebook(in_swept: Bench) -> None:
    raised, _, crashed = in_swept.current()
    assert raised.data.tags[ERROR_TAG] == "ValueError: the notebook's own <error>"
    assert "ValueError: the notebook's own <error>" in in_swept.answer.stderr
    assert b"the notebook's own <error>" in read_artifact(raised.info.run_id, "notebook/dummy.ipynb")
    assert b"ValueError" in read_artifact(raised.info.run_id, "notebook/traceback.txt")
    assert "Kernel died" in crashed.data.tags[ERROR_TAG]


def test_a_finished_run_holds_metrics_tables_figures_notebook_and_environment(in_swept: Bench) -> None:
    done = in_swept.current()[1]
    assert done.data.metrics["peak_bytes"] == pytest.approx(4e8 + 1.3e9 * 0.6)
    assert done.data.params | {"outcome": "ok", "budget": "60%", "prompts": "4"} == done.data.params
    assert results.artifact_frame(done.info.run_id, "requests")["prompt"].tolist() == [0, 1, 2, 3]
    assert read_artifact(done.info.run_id, "figures/curve.png").startswith(b"\x89PNG")
    environment = json.loads(read_artifact(done.info.run_id, "environment.json"))
    assert environment["model_hash"] == "m0" and environment["seed"] == 0
    assert environment["packages"]["torch"] and environment["cores"] >= 1
    executed = json.loads(read_artifact(done.info.run_id, "notebook/dummy.ipynb"))
    assert "papermill" in executed["metadata"] and executed["cells"][-1]["outputs"]


def test_runs_use_this_interpreter_whatever_kernel_the_notebook_names(in_swept: Bench) -> None:
    environment = json.loads(read_artifact(in_swept.current()[1].info.run_id, "environment.json"))
    assert Path(environment["executable"]) == Path(sys.executable)


def test_the_table_of_runs_has_typed_parameters_metrics_and_errors(in_swept: Bench) -> None:
    frame = results.runs_frame("dummy", notebook="dummy")
    assert frame["outcome"].tolist() == ["raise", "ok", "crash"]
    assert frame["budget"].tolist() == ["60%"] * 3
    assert frame.loc[1, "perplexity_ratio"] == 1.0
    assert frame["error"].notna().tolist() == [True, False, True]
    with pytest.raises(ExperimentError, match="no sweep named 'other'"):
        results.runs_frame("other")


@pytest.mark.long
def test_finished_runs_are_skipped_and_new_points_run_under_the_same_parent(bench: Bench) -> None:
    first = run_sweep(bench.write(grid={"tolerance": [0.0]}))
    again = run_sweep(bench.write(grid={"tolerance": [0.0]}))
    more = run_sweep(bench.write(grid={"tolerance": [1.0, 0.0]}), jobs=2)
    assert (len(first.finished), len(again.finished), len(again.skipped)) == (1, 0, 1)
    assert (more.finished, more.skipped) == (["dummy tolerance=1"], ["dummy tolerance=0"])
    assert first.parent_run_id == again.parent_run_id == more.parent_run_id
    assert [item.data.params["tolerance"] for item in bench.current()] == ["1.0", "0.0"]
    assert len(bench.all_runs()) == 2
    fresh = run_sweep(bench.write(grid={"tolerance": [0.0]}), fresh=True)
    assert fresh.parent_run_id != first.parent_run_id and len(fresh.finished) == 1


def test_a_control_runs_first_and_last_and_its_drift_marks_the_sweep(bench: Bench) -> None:
    timed = {"notebook": str(NOTEBOOK), "kind": "timing"}
    stages = [
        timed | {"control": True, "label": "control", "metrics": ["tpot_s"]},
        timed | {"grid": {"budget": ["60%"]}},
    ]
    path = bench.root / "dummy.yaml"
    path.write_text(yaml.safe_dump({"name": "dummy", "stages": stages}))
    run_sweep(path)
    client = open_store()
    assert [item.info.run_name for item in bench.current()] == [
        "dummy control",
        "dummy budget=60%",
        "dummy control again",
    ]
    assert drift_of(find_parent(client)) == ("tpot_s", 0.0)
    last = bench.current()[-1]
    client.log_metric(last.info.run_id, "tpot_s", 1.05 * last.data.metrics["tpot_s"])
    said = io.StringIO()
    again = run_sweep(path, console=Console(file=said, width=200))
    assert not again.finished and len(again.skipped) == 3
    assert drift_of(find_parent(client)) == ("tpot_s", 0.05)
    assert "tpot_s of the control moved by +5.0%" in said.getvalue()
    page = read_sweep_page(client, find_parent(client), bench.root / "scratch")
    assert page.drifted and "+5.0% from the first control to the last" in page.drift


def test_a_killed_sweep_leaves_no_kernel_and_is_resumed(bench: Bench) -> None:
    gate = bench.root / "gate"
    path = bench.write(grid={"outcome": ["ok", "wait"]}, fixed={"gate": str(gate)}, kind="timing")
    process = bench.start("sweep", str(path))
    kernel = bench.kernel_of_waiting_run(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not psutil.pid_exists(kernel))
    assert bench.statuses() == ["FINISHED", "RUNNING"]
    assert bench.store_is_intact()

    gate.touch()
    resumed = run_sweep(path)
    assert (resumed.skipped, len(resumed.finished)) == (["dummy outcome=ok"], 1)
    assert bench.statuses() == ["FINISHED", "FINISHED"]
    assert sorted(item.info.status for item in bench.all_runs()) == ["FINISHED", "FINISHED", "KILLED"]
    assert find_parent(open_store()).info.status == "FINISHED"


@pytest.mark.long
def test_a_run_whose_process_is_killed_is_recorded_and_done_again(bench: Bench) -> None:
    gate = bench.root / "gate"
    path = bench.write(grid={"seed": [0]}, fixed={"outcome": "wait", "gate": str(gate)})
    kernels: list[int] = []

    def kill_the_process_that_holds_the_kernel() -> None:
        found = wait_for(lambda: [pid for item in bench.all_runs() if (pid := item.data.tags.get("dummy.pid"))])
        kernels.append(int(found[0]))
        psutil.Process(kernels[0]).parent().kill()

    killer = threading.Thread(target=kill_the_process_that_holds_the_kernel)
    killer.start()
    assert run_sweep(path).failed == ["dummy seed=0"]
    killer.join()
    assert "killed by signal 9" in bench.current()[0].data.tags[ERROR_TAG]
    wait_for(lambda: not psutil.pid_exists(kernels[0]))
    gate.touch()
    assert run_sweep(path).finished == ["dummy seed=0"]
    assert bench.statuses() == ["FINISHED"] and len(bench.all_runs()) == 2
    assert bench.store_is_intact()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.long
def test_an_interrupted_sweep_marks_its_run_as_killed(bench: Bench, number: signal.Signals) -> None:
    path = bench.write(grid={"outcome": ["wait", "ok"]}, fixed={"gate": str(bench.root / "never")})
    process = bench.start("sweep", str(path), "--jobs", "1")
    kernel = bench.kernel_of_waiting_run(process)
    process.send_signal(number)
    assert process.wait() == 130
    wait_for(lambda: not psutil.pid_exists(kernel))
    assert bench.statuses() == ["KILLED"]
    assert find_parent(open_store()).info.status == "KILLED"
    assert not (bench.root / "mlruns" / "running" / "dummy").exists()


@pytest.mark.long
def test_a_full_disk_stops_the_sweep_with_a_reason_and_it_resumes_with_room(bench: Bench) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(bench.root / "mlruns" / "artifacts")]
    (bench.root / "mlruns" / "artifacts").mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    try:
        path = bench.write(grid={"outcome": ["ok", "big"]}, kind="timing")
        full = bench.emoe("sweep", str(path))
        assert full.returncode == 2
        assert "no space left on device" in full.stderr and "Make room" in full.stderr
        assert "Traceback" not in full.stderr
        assert bench.statuses() == ["FINISHED", "FAILED"]
        assert bench.store_is_intact()
        subprocess.run(["mount", "-o", "remount,size=100m", mount[-1]], check=True)
        assert run_sweep(path).skipped == ["dummy outcome=ok"]
        assert bench.statuses() == ["FINISHED", "FINISHED"]
    finally:
        subprocess.run(["umount", mount[-1]], check=True)


def test_a_sweep_that_runs_is_not_started_twice(bench: Bench) -> None:
    path = bench.write(grid={"tolerance": [0.0]})
    with locked("sweep-dummy"), pytest.raises(ExperimentError, match="already running"):
        run_sweep(path)


def test_timing_excludes_everything_and_quality_shares(bench: Bench) -> None:
    def free(*, shared: bool) -> bool:
        with locked("machine", shared=shared, wait=False) as mine:
            return mine

    with locked("machine"):
        assert (free(shared=False), free(shared=True)) == (False, False)
    with locked("machine", shared=True):
        assert (free(shared=False), free(shared=True)) == (False, True)
    assert free(shared=False)


@pytest.mark.long
def test_a_sweep_of_another_machine_is_left_alone_until_it_is_taken_over(bench: Bench) -> None:
    path = bench.write(grid={"tolerance": [0.0]})
    first = run_sweep(path)
    client = open_store()
    client.set_tag(first.parent_run_id, OWNER_TAG, "elsewhere:1:1.00")
    client.update_run(first.parent_run_id, status="RUNNING")
    ghost = new_run(client, "dummy", "ghost", parent=first.parent_run_id, tags={OWNER_TAG: "elsewhere:1:1.00"})
    with pytest.raises(ExperimentError, match=r"already running .host:process elsewhere:1.*--take-over"):
        run_sweep(path)
    assert run_sweep(path, take_over=True).skipped == first.finished
    assert client.get_run(ghost).info.status == "KILLED" and bench.statuses() == ["FINISHED"]


@pytest.mark.parametrize("jobs", [0, 5])
def test_jobs_outside_one_to_four_are_refused(bench: Bench, jobs: int) -> None:
    with pytest.raises(OptionError, match="1 to 4"):
        run_sweep(bench.write(grid={"tolerance": [0.0]}), jobs=jobs)


def test_an_owner_is_alive_only_as_the_same_process() -> None:
    mine = owner_tag()
    host, pid, started = mine.split(":")
    assert is_alive(mine)
    assert not is_alive(f"{host}:{pid}:{float(started) + 10:.2f}")
    assert not is_alive("") and OWNER_TAG
