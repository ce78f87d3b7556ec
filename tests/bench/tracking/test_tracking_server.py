"""Integration: a real MLflow server on a real PostgreSQL, as a sweep uses it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import sqlalchemy
from mlflow_bench import free_port, tracking_server

from emoe_core.errors import ExperimentError
from workbench.tracking import results
from workbench.tracking import run as tracking
from workbench.tracking.place import HOME_VARIABLE, SERVER_VARIABLE, store_uri
from workbench.tracking.store import open_store


@pytest.mark.long
def test_runs_and_artifacts_go_through_the_server_into_its_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    with tracking_server() as server:
        monkeypatch.setenv(SERVER_VARIABLE, server.address)
        with tracking.run("elsewhere", "first", params={"seed": 1}) as run:
            run.log_metrics({"peak_bytes": 5})
            run.log_frame("requests", pd.DataFrame({"ttft_s": [0.1, 0.2]}))
        assert open_store().get_run(run.run_id).info.artifact_uri.startswith("mlflow-artifacts:")
        assert results.artifact_frame(run.run_id, "requests")["ttft_s"].tolist() == [0.1, 0.2]
        assert list(server.artifacts.rglob("requests.parquet"))
        with sqlalchemy.create_engine(server.database, poolclass=sqlalchemy.NullPool).connect() as connection:
            found = connection.execute(sqlalchemy.text("SELECT run_uuid, status FROM runs")).all()
    assert [tuple(row) for row in found] == [(run.run_id, "FINISHED")]
    assert not (tmp_path / "mlruns" / "mlflow.db").exists(), "nothing is written to this disk"


def test_a_server_that_does_not_answer_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ExperimentError, match=r"does not answer.*mlflow server"):
        open_store()


def test_only_an_address_of_a_server_moves_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.setenv(SERVER_VARIABLE, "")
    assert store_uri().endswith("mlruns/mlflow.db")
    monkeypatch.setenv(SERVER_VARIABLE, "https://host/")
    assert store_uri() == "https://host"
