"""A recorded result is drawn as it was measured, unless it is to be measured anew; only what was measured is logged."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from emoe_core.errors import ExperimentError
from workbench.tracking import findings as module
from workbench.tracking.findings import PROMPTS_TAG, Findings, findings, recorded_run
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.results import artifact_frame
from workbench.tracking.results_file import SweepResults, write_results
from workbench.tracking.run import ENVIRONMENT_FILE, RUN_VARIABLE
from workbench.tracking.runs import INDEX_TAG, NOTEBOOK_TAG
from workbench.tracking.store import open_store

SUMMARY = pd.DataFrame({"label": ["a", "b"], "kl_nats": [0.25, float("nan")], "loads": [3, 4], "exact": [True, False]})
# A column of the same name holds something else here.
LAYERS = pd.DataFrame({"layer": [0, 1, 2], "loads": ["few", None, "many"], "table": [1.0, 2.0, 3.0]})
MEASURED = Findings({"summary": SUMMARY, "layers": LAYERS}, {"model_hash": "abc", "seed": 3}, prompts=4)


def recorded(notebook: str, place: int, status: str = "FINISHED", **tables: pd.DataFrame) -> RecordedRun:
    tags = {NOTEBOOK_TAG: notebook, INDEX_TAG: str(place), PROMPTS_TAG: "4"}
    texts = {ENVIRONMENT_FILE: json.dumps({"model_hash": "abc", "seed": 3, "data_hash": None})}
    return RecordedRun(f"{place:032x}", "a run", status, 1, 2, tags=tags, texts=texts, tables=tables)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    runs = [
        recorded("99_claim", 2),
        recorded("99_claim", 1, summary=SUMMARY, layers=LAYERS),
        recorded("99_claim", 0, status="FAILED"),
    ]
    write_results(SweepResults("claims", "", runs), tmp_path / "results")
    return tmp_path / "results"


def test_what_is_recorded_is_drawn_and_what_is_not_is_measured(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = Findings({"summary": SUMMARY[:1]})
    drawn = findings("99_claim", False, lambda progress: new)
    assert_frame_equal(drawn["summary"], SUMMARY)
    assert_frame_equal(drawn["layers"], LAYERS)
    assert drawn.recorded and (drawn.identity, drawn.prompts) == (MEASURED.identity, 4)
    assert findings("99_claim", True, lambda progress: new) is new
    capsys.readouterr()
    assert findings("98_other", False, lambda progress: new) is new
    assert "No recorded result of 98_other" in capsys.readouterr().err
    monkeypatch.setenv(RUN_VARIABLE, "a run of a sweep")
    assert findings("99_claim", False, lambda progress: new) is new


def test_a_damaged_file_of_results_is_named_with_the_way_out(results: Path) -> None:
    (results / "claims.runs.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ExperimentError, match=r"'claims'.*emoe results export claims"):
        recorded_run("99_claim", results)
    SUMMARY.to_parquet(results / "claims.runs.parquet")
    with pytest.raises(ExperimentError, match=r"'claims'.*emoe results export claims"):
        recorded_run("99_claim", results)


def test_what_was_measured_is_logged_once_with_all_that_was_made_of_it(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_HOME", str(tmp_path))
    told = {"parameters": {"seed": 3}, "metrics": {"kl_nats": 0.25}}
    drawn = findings("99_claim", False, lambda progress: MEASURED)
    assert "not logged" in drawn.log("claims", "recorded", **told)
    assert MEASURED.log("claims", "measured", **told, tables={"closing": SUMMARY[:1]}) == "logged"
    client = open_store()
    (run,) = client.search_runs([client.get_experiment_by_name("claims").experiment_id])
    assert run.data.metrics["kl_nats"] == 0.25 and run.data.params["seed"] == "3"
    assert_frame_equal(artifact_frame(run.info.run_id, "layers"), LAYERS)
    assert len(artifact_frame(run.info.run_id, "closing")) == 1
