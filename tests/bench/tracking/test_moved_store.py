"""A project folder that is moved, copied, renamed or mounted elsewhere: its runs are whole, and new ones lie beside."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from sweep_bench import Bench

from workbench.report import write_report
from workbench.sweep.run import run_sweep
from workbench.tracking import results
from workbench.tracking import run as tracking
from workbench.tracking.place import HOME_VARIABLE, store_uri
from workbench.tracking.run_lookup import find_run
from workbench.tracking.store import open_store
from workbench.tracking.store_errors import StoreError

Enter = Callable[[Path], Path]
NAMES = ("plain", "a b", "50%", "a%20b", "a#b", "what?", "naïve 'quoted'", "mlruns")


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Return what makes a folder the project."""

    def into(root: Path) -> Path:
        monkeypatch.setenv(HOME_VARIABLE, str(root))
        return root

    return into


@pytest.fixture
def old(empty_store: Path, tmp_path: Path, enter: Enter) -> Path:
    """Return a project with one run."""
    root = enter(tmp_path / "old")
    shutil.copytree(empty_store / "mlruns", root / "mlruns")
    record("first")
    return root


def record(name: str) -> str:
    """Make a run with a table and a figure and return its id."""
    with tracking.run("by hand", name) as run:
        run.log_metrics({"loads": 1})
        run.log_frame("requests", pd.DataFrame({"ttft_s": [0.1, 0.2]}))
        figure = Figure()
        figure.subplots().plot([1, 2])
        run.log_figure("line", figure)
    return run.run_id


def assert_whole(root: Path) -> None:
    """Assert that every way to a run's artifacts leads to them, MLflow's own included, and new runs lie beside."""
    run = find_run(open_store(), "first")
    assert run.environment["python"] and run.table_names == ["requests"]
    assert results.artifact_frame(run.run_id, "requests")["ttft_s"].tolist() == [0.1, 0.2]
    site = write_report(root / "report").parent
    assert list(site.glob("runs/*/figures/line.png")) and list(site.glob("runs/*/data/requests.csv"))
    from mlflow.tracking import MlflowClient

    own = MlflowClient(store_uri())
    assert "environment.json" in [item.path for item in own.list_artifacts(run.run_id)]
    again = record("again")
    assert (root / "mlruns" / "artifacts" / "by_hand" / again / "artifacts" / "figures" / "line.png").is_file()
    assert "environment.json" in [item.path for item in own.list_artifacts(again)]


@pytest.mark.parametrize("name", NAMES)
def test_a_moved_project_has_its_runs_and_writes_beside_them(old: Path, enter: Enter, name: str) -> None:
    old.rename(old.with_name(name))
    assert_whole(enter(old.with_name(name)))
    assert [path.name for path in old.parent.iterdir()] == [name], "nothing is written elsewhere"


def test_a_copied_project_is_apart_from_the_first(old: Path, enter: Enter, tmp_path: Path) -> None:
    shutil.copytree(old, tmp_path / "copy")
    copy = enter(tmp_path / "copy")
    before = sorted((old / "mlruns" / "artifacts").rglob("*"))
    assert_whole(copy)
    assert sorted((old / "mlruns" / "artifacts").rglob("*")) == before
    shutil.rmtree(copy)
    assert_whole(enter(old))


def test_a_project_reached_through_a_link_is_the_same(old: Path, enter: Enter, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old)
    assert_whole(enter(tmp_path / "link"))
    (tmp_path / "elsewhere").mkdir()
    (old / "mlruns").rename(tmp_path / "elsewhere" / "runs")
    (old / "mlruns").symlink_to(tmp_path / "elsewhere" / "runs")
    assert_whole(enter(old))


def test_a_run_under_way_writes_beside_its_store_wherever_another_process_mounts_it(old: Path, enter: Enter) -> None:
    with tracking.run("by hand", "under way") as run:
        with closing(sqlite3.connect(old / "mlruns" / "mlflow.db")) as connection, connection:
            connection.execute("UPDATE runs SET artifact_uri = replace(artifact_uri, '/old/', '/mounted/')")
        run.log_text("late.txt", "text")
        assert [item.path for item in open_store().list_artifacts(run.run_id) if item.path == "late.txt"]
    assert not (old.parent / "mounted").exists()


@pytest.mark.long
def test_a_sweep_goes_on_after_its_project_was_moved(old: Path, enter: Enter) -> None:
    first = run_sweep(Bench(old).write(grid={"tolerance": [0.0]}))
    new = enter(old.rename(old.with_name("new place")))
    again = run_sweep(Bench(new).write(grid={"tolerance": [0.0, 1.0]}))
    assert (again.skipped, again.finished) == (first.finished, ["dummy tolerance=1"])
    assert again.parent_run_id == first.parent_run_id
    for run in Bench(new).current():
        assert (new / "mlruns" / "artifacts" / "dummy" / run.info.run_id / "artifacts" / "notebook").is_dir()
    assert not old.exists()


def test_artifacts_that_did_not_come_along_are_named_in_one_line(old: Path, enter: Enter, tmp_path: Path) -> None:
    (tmp_path / "new" / "mlruns").mkdir(parents=True)
    shutil.copy(old / "mlruns" / "mlflow.db", tmp_path / "new" / "mlruns")
    enter(tmp_path / "new")
    run = find_run(open_store(), "first")
    for read in (
        lambda: write_report(tmp_path / "report"),
        lambda: run.environment,
        lambda: run.table_names,
        lambda: run.notebook,
        lambda: results.artifact_frame(run.run_id, "requests"),
    ):
        with pytest.raises(
            StoreError, match=r"^the artifacts of run \w+ are gone from .*/new/mlruns/artifacts.*delete"
        ) as told:
            read()
        assert "\n" not in str(told.value)


def test_artifacts_elsewhere_stay_where_they_are(old: Path, enter: Enter, tmp_path: Path) -> None:
    client = open_store()
    experiment = client.create_experiment("elsewhere", artifact_location=(tmp_path / "elsewhere").as_uri())
    run_id = client.create_run(experiment).info.run_id
    client.log_text(run_id, "text", "folder/note.txt")
    old.rename(tmp_path / "new")
    enter(tmp_path / "new")
    assert Path(open_store().download_artifacts(run_id, "folder/note.txt")).read_text() == "text"
    assert (tmp_path / "elsewhere" / run_id / "artifacts" / "folder" / "note.txt").is_file()


@pytest.fixture
def read_only(old: Path, tmp_path: Path) -> Iterator[Path]:
    """Return the project mounted at another place, for reading only."""
    place = tmp_path / "mounted"
    place.mkdir()
    commands = (["mount", "--bind", str(old), str(place)], ["mount", "-o", "remount,ro,bind", str(place)])
    if os.geteuid() != 0 or any(subprocess.run(c, capture_output=True, check=False).returncode for c in commands):
        pytest.skip("only root may mount a folder for reading only")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_project_that_may_only_be_read_is_read_and_says_so_when_written(
    read_only: Path, enter: Enter, tmp_path: Path
) -> None:
    enter(read_only)
    assert results.artifact_frame(find_run(open_store(), "first").run_id, "requests")["ttft_s"].tolist() == [0.1, 0.2]
    site = write_report(tmp_path / "report").parent
    assert list(site.glob("runs/*/figures/line.png"))
    with pytest.raises(StoreError, match=r"readonly database.*Make it writable"):
        record("again")
    with pytest.raises(StoreError, match=r"read-only file system.*--out"):
        write_report(read_only / "report")
