"""Integration: a real MLflow server on a real PostgreSQL, as a sweep uses it."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from emoe_core.errors import ExperimentError, OptionError
from workbench.tracking import results
from workbench.tracking import run as tracking
from workbench.tracking.place import HOME_VARIABLE, SERVER_VARIABLE, store_uri
from workbench.tracking.postgres import Postgres, find_programs
from workbench.tracking.server import ServerConfig, serving
from workbench.tracking.store import open_store


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that the system's user ``postgres`` can reach; pytest's own are private."""
    try:
        find_programs()
    except OptionError as error:
        pytest.skip(str(error))
    pytest.importorskip("psycopg2", reason="the driver of PostgreSQL is not installed (extra `postgres`)")
    made = Path(tempfile.mkdtemp(prefix="emoe-server-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_runs_and_artifacts_go_through_the_server_and_stay_in_its_database(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig(folder, port=free_port(), workers=1)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.setenv(SERVER_VARIABLE, config.address)
    with serving(config):
        with tracking.run("elsewhere", "first", params={"seed": 1}) as run:
            run.log_metrics({"peak_bytes": 5})
            run.log_frame("requests", pd.DataFrame({"ttft_s": [0.1, 0.2]}))
        assert open_store().get_run(run.run_id).info.artifact_uri.startswith("mlflow-artifacts:")
        assert results.artifact_frame(run.run_id, "requests")["ttft_s"].tolist() == [0.1, 0.2]
        assert list((folder / "artifacts").rglob("requests.parquet"))
        with pytest.raises(OptionError, match="already runs in"), serving(config):
            pass
    assert not (tmp_path / "mlruns" / "mlflow.db").exists(), "nothing is written to this disk"
    assert not (folder / "postgres" / "postmaster.pid").exists(), "the database is stopped with the server"
    cluster = Postgres(folder / "postgres", find_programs())
    try:
        cluster.start()
        import sqlalchemy

        with sqlalchemy.create_engine(cluster.database("mlflow")).connect() as connection:
            found = connection.execute(sqlalchemy.text("SELECT run_uuid, status FROM runs")).all()
    finally:
        cluster.stop()
    assert [tuple(row) for row in found] == [(run.run_id, "FINISHED")]


def test_a_server_that_does_not_answer_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ExperimentError, match=r"does not answer.*emoe tracking-server"):
        open_store()


def test_only_an_address_of_a_server_moves_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.setenv(SERVER_VARIABLE, "")
    assert store_uri().endswith("mlruns/mlflow.db")
    monkeypatch.setenv(SERVER_VARIABLE, "https://host/")
    assert store_uri() == "https://host"


def test_unusable_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--port 0"):
        ServerConfig(tmp_path, port=0)
    with pytest.raises(OptionError, match="--workers 0"):
        ServerConfig(tmp_path, workers=0)
