"""A store that cannot be opened or written: one line with the fix and exit code 2, whoever opens it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from site_pages import add_run
from sqlalchemy import event
from sweep_bench import Bench

from emoe_core.errors import ExperimentError
from workbench.cli import main
from workbench.report import write_report
from workbench.tracking import run as tracking
from workbench.tracking import store_file
from workbench.tracking.place import SERVER_VARIABLE, database_file
from workbench.tracking.store import open_store
from workbench.tracking.store_errors import StoreError
from workbench.tracking.traces import Span

OLDER = "0584bdc529eb"  # a revision of the schema that this MLflow knows and has left behind


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for a lock that the test itself holds."""
    monkeypatch.setattr(store_file, "LOCK_PATIENCE_S", 0.0)


def write(statement: str) -> None:
    """Change the store's database behind MLflow's back."""
    with closing(sqlite3.connect(database_file())) as connection, connection:
        connection.execute(statement)


def newer() -> None:
    write("UPDATE alembic_version SET version_num = 'ffffffffffff'")


def newer_with_other_tables() -> None:
    newer()
    write("DROP TABLE trace_tags")


def older() -> None:
    write(f"UPDATE alembic_version SET version_num = '{OLDER}'")


def halfway() -> None:
    write("CREATE TABLE _alembic_tmp_runs (run_uuid VARCHAR(32))")


def upgraded_halfway() -> None:
    older()
    write("DROP TABLE trace_tags")


def damaged() -> None:
    database_file().write_bytes(b"no database, but long enough to be one\n" * 4000)


def damaged_inside() -> None:
    content = bytearray(database_file().read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    database_file().write_bytes(content)


def cut_off() -> None:
    os.truncate(database_file(), database_file().stat().st_size // 2)


def a_folder() -> None:
    database_file().unlink()
    database_file().mkdir()


BROKEN = {
    newer: r"written by a newer MLflow \(schema ffffffffffff.*set EMOE_HOME",
    newer_with_other_tables: "written by a newer MLflow",
    older: "out-of-date.*make a copy of that file, then run: mlflow db upgrade sqlite:///",
    halfway: "upgrade of its schema has begun and not ended.*restore the copy",
    upgraded_halfway: r"table \S+ already exists\. Let an upgrade.*restore the copy",
    damaged: "file is not a database.*Restore",
    damaged_inside: "malformed.*Restore",
    cut_off: "malformed.*Restore",
    a_folder: "is no file.*move it away",
}


def assert_one_line(error: StoreError) -> None:
    assert "\n" not in str(error) and "[SQL" not in str(error) and "sqlalche.me" not in str(error)


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_store_that_cannot_be_opened_says_why_and_stays_as_it_is(bench: Bench, breaks) -> None:  # type: ignore[no-untyped-def]
    breaks()
    before = database_file().read_bytes() if database_file().is_file() else b""
    with pytest.raises(StoreError, match=BROKEN[breaks]) as told:
        open_store()
    assert_one_line(told.value)
    if breaks is not upgraded_halfway:
        assert before == (database_file().read_bytes() if database_file().is_file() else b"")


@pytest.fixture
def held(bench: Bench, request: pytest.FixtureRequest) -> Iterator[sqlite3.Connection]:
    """Return a connection of another program that holds the store's lock."""
    add_run(bench, "s", "one", metrics={"loads": 1})
    with closing(sqlite3.connect(database_file(), isolation_level=None)) as connection:
        connection.execute(f"BEGIN {request.param}")
        yield connection


@pytest.mark.parametrize("held", ["EXCLUSIVE"], indirect=True)
def test_a_locked_store_says_so_and_is_used_again_afterwards(held: sqlite3.Connection) -> None:
    with pytest.raises(StoreError, match=r"database is locked\. Another process holds it") as told:
        open_store()
    assert_one_line(told.value)
    held.execute("ROLLBACK")
    assert len(open_store().search_experiments()) == 2


@pytest.mark.parametrize("held", ["IMMEDIATE"], indirect=True)
def test_a_store_that_another_process_writes_to_is_read(held: sqlite3.Connection, bench: Bench) -> None:
    assert write_report(bench.root / "report").is_file()
    client = open_store()

    @event.listens_for(client._tracking_client.store.engine, "before_cursor_execute", retval=True)
    def do_not_wait(*call: Any) -> tuple[Any, Any]:
        return ("PRAGMA busy_timeout = 0" if "busy_timeout" in call[2] else call[2]), call[3]

    with pytest.raises(StoreError, match=r"database is locked.*run the same command again") as told:
        client.set_experiment_tag("0", "name", "value")
    assert_one_line(told.value)
    held.execute("ROLLBACK")
    client.set_experiment_tag("0", "name", "value")


COMMANDS = (
    ("report",),
    ("report", "--hints"),
    ("compare", "a", "b"),
    ("verify", "a"),
    ("ui",),
    ("sweep", "SWEEP"),
    ("sweep", "SWEEP", "--dry-run"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_refuses_a_broken_store_in_one_line(
    bench: Bench, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    newer()
    path = str(bench.write(grid={"seed": [0]}))
    monkeypatch.setattr(sys, "argv", ["emoe", *(path if word == "SWEEP" else word for word in command)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1 and "written by a newer MLflow" in said.err


def test_a_notebook_is_told_in_one_line_too(bench: Bench) -> None:
    damaged()
    with pytest.raises(StoreError, match="file is not a database") as told, tracking.run("by hand", "first"):
        pass
    assert_one_line(told.value)


def test_a_store_that_breaks_while_a_run_writes_to_it_is_told_in_one_line(bench: Bench) -> None:
    with (
        pytest.raises(StoreError, match=r"no such table: latest_metrics\. Let an upgrade") as told,
        tracking.run("by hand", "1") as run,
    ):
        write("DROP TABLE latest_metrics")
        run.log_metrics({"loads": 1})
    assert_one_line(told.value)


@pytest.mark.parametrize("address", ["file:///somewhere/mlruns", "sqlite:///elsewhere.db", "databricks", "mlruns"])
def test_a_store_of_another_kind_is_refused_and_not_passed_over(
    bench: Bench, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, address)
    with pytest.raises(ExperimentError, match=r"MLFLOW_TRACKING_URI=.* is no MLflow server.*Unset it"):
        open_store()


def test_the_stores_own_address_may_be_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, f"sqlite:///{database_file()}")
    assert open_store().get_experiment_by_name("Default")
    monkeypatch.chdir(bench.root)
    monkeypatch.setenv(SERVER_VARIABLE, "sqlite:///mlruns/mlflow.db")
    assert open_store().get_experiment_by_name("Default")


def test_traces_leave_no_address_of_a_store_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)
    with tracking.run("by hand", "first") as run:
        run.log_traces([Span("request", "CHAIN", 1.0, 2.0)])
    assert SERVER_VARIABLE not in os.environ
    with tracking.run("by hand", "second"):
        pass


def test_a_file_without_content_becomes_a_store(bench: Bench) -> None:
    shutil.rmtree(bench.root / "mlruns")
    database_file().touch()
    assert open_store().get_experiment_by_name("Default")
