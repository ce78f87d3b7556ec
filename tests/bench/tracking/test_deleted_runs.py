"""What a user does to a sweep's runs in MLflow while it runs, or before it goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from site_pages import add_run
from sweep_bench import Bench, wait_for

from emoe_core.errors import ExperimentError
from workbench.report import write_report
from workbench.sweep.run import SweepResult, run_sweep
from workbench.tracking import run as tracking
from workbench.tracking.run import PARENT_TAG
from workbench.tracking.runs import ERROR_TAG, INDEX_TAG, SWEEP_TAG, current_runs, find_parent, parents
from workbench.tracking.store import open_store
from workbench.tracking.store_errors import DeletedError


def sweep_while(bench: Bench, meddle: Callable[[Any, Any], object]) -> SweepResult:
    """Run a sweep of two points; `meddle` is called with a client and the first run while that waits at a gate."""
    gate = bench.root / "gate"
    path = bench.write(grid={"outcome": ["wait", "ok"]}, fixed={"gate": str(gate)})

    def meddle_and_open() -> None:
        run = wait_for(lambda: [item for item in bench.all_runs() if "dummy.pid" in item.data.tags])[0]
        try:
            meddle(open_store(), run)
        finally:
            gate.touch()

    thread = threading.Thread(target=meddle_and_open)
    thread.start()
    try:
        return run_sweep(path, jobs=1)
    finally:
        thread.join()


@pytest.mark.long
def test_a_run_that_is_deleted_while_it_runs_has_failed_and_the_next_one_runs(bench: Bench) -> None:
    result = sweep_while(bench, lambda client, run: client.delete_run(run.info.run_id))
    assert (result.failed, result.finished, result.exit_code) == (["dummy outcome=wait"], ["dummy outcome=ok"], 1)
    assert bench.statuses() == ["FINISHED"] and find_parent(open_store()).info.status == "FAILED"
    again = run_sweep(bench.root / "dummy.yaml")
    assert (again.skipped, again.finished) == (["dummy outcome=ok"], ["dummy outcome=wait"])
    assert bench.statuses() == ["FINISHED", "FINISHED"]


@pytest.mark.long
def test_a_sweep_whose_own_run_is_deleted_stops_and_says_how_to_have_it_back(bench: Bench) -> None:
    with pytest.raises(DeletedError, match=r"the run \w+ of sweep 'dummy' was deleted in MLflow\. .* restore") as told:
        sweep_while(bench, lambda client, run: client.delete_run(run.data.tags[PARENT_TAG]))
    parent = str(told.value).split()[2]
    assert find_parent(open_store()) is None
    open_store().restore_run(parent)
    assert bench.statuses() == ["FINISHED"], "what had run is kept"
    again = run_sweep(bench.root / "dummy.yaml")
    assert again.parent_run_id == parent
    assert (again.skipped, again.finished) == (["dummy outcome=wait"], ["dummy outcome=ok"])


@pytest.mark.long
def test_a_sweep_whose_experiment_is_deleted_stops_and_says_so(bench: Bench) -> None:
    with pytest.raises(ExperimentError, match=r"experiment 'dummy' was deleted. Restore it"):
        sweep_while(bench, lambda client, run: client.delete_experiment(run.info.experiment_id))


@pytest.mark.long
def test_a_state_that_is_set_by_hand_gives_way_to_how_the_run_ends(bench: Bench) -> None:
    result = sweep_while(bench, lambda client, run: client.set_terminated(run.info.run_id, "FAILED"))
    assert len(result.finished) == 2 and bench.statuses() == ["FINISHED", "FINISHED"]


@pytest.mark.long
def test_edited_tags_do_not_stop_a_sweep_or_a_report(bench: Bench) -> None:
    path = bench.write(grid={"tolerance": [0.0]})
    add_run(bench, "other", "one", metrics={"loads": 1}, tags={INDEX_TAG: "first", "env.commit": ""})
    first = run_sweep(path)
    client = open_store()
    for name in ("env.commit", INDEX_TAG, ERROR_TAG, "emoe.axes", "emoe.metrics", "emoe.kind", "emoe.owner"):
        client.set_tag(bench.current()[0].info.run_id, name, " ")
    client.set_tag(find_parent(client, "other").info.run_id, "emoe.owner", "nobody")
    assert run_sweep(path).skipped == first.finished
    assert len(current_runs(client, find_parent(client, "other"))) == 1
    client.delete_tag(find_parent(client, "other").info.run_id, SWEEP_TAG)
    assert [item.data.tags[SWEEP_TAG] for item in parents(client)] == ["dummy"]
    assert write_report(bench.root / "report").is_file()


def test_a_notebook_whose_run_is_deleted_is_told_what_it_did(bench: Bench) -> None:
    with pytest.raises(DeletedError, match=r"the run \w+ was deleted in MLflow"), tracking.run("by hand", "a") as run:
        open_store().delete_run(run.run_id)
        run.log_metrics({"loads": 1})
    with pytest.raises(ValueError, match="its own"), tracking.run("by hand", "b") as run:
        open_store().delete_run(run.run_id)
        raise ValueError("its own")
