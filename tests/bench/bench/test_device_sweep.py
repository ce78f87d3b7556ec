"""The sweep of a device: its records are the runs that `emoe sweep` would have made, and none passes for a GPU's."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from forced_bench import spec_of
from sweep_bench import Bench

import gpu
from emoe_core.engine import Engine
from emoe_core.errors import ExperimentError, OptionError
from workbench.bench import device_sweep
from workbench.bench.device_page import REHEARSAL_TAG
from workbench.bench.device_point import DevicePoint, measure_point, metrics_of
from workbench.bench.device_sweep import GRACE_S, SweepOutcome, planned_runs, run_device_sweep
from workbench.machine.environment import describe_environment
from workbench.measure.device_job import measure_on_device
from workbench.metrics.catalogue import metric_of
from workbench.models.reference.tiny import tiny_moe
from workbench.results.taking import CODE_TAG, Taken, take_results
from workbench.sweep.plan import describe_plan
from workbench.systems.decoder import decoder_class
from workbench.tracking.findings import Findings
from workbench.tracking.notebook import notebook_parameters
from workbench.tracking.record import RunRecord
from workbench.tracking.results import artifact_frame, runs_frame
from workbench.tracking.run_file import recorded_runs
from workbench.tracking.store import open_store

ROOT = Path(__file__).parents[3]
NOTEBOOK = ROOT / "notebooks" / "13_decoding_on_a_device.ipynb"
SPEEDS = {"100%": 50.0, "40%": 25.0}


class Measured:
    """Stands in for measuring: notes the points, and gives each what its budget stands for, or its error."""

    def __init__(self, **errors: BaseException) -> None:
        self.points: list[DevicePoint] = []
        self.within_s: list[float] = []
        self.errors = errors

    def __call__(self, point: DevicePoint, report: Any, within_s: float) -> Findings:
        self.points.append(point)
        self.within_s.append(within_s)
        if point.system in self.errors:
            raise self.errors[point.system]
        speed = {"tokens_per_s": SPEEDS[point.budget] if point.system == "emoe" else 40.0, "ttft_s": 0.5}
        row = {"operation": "a|product", "calls_per_token": 2.0, "device_us_per_token": 3.0, "host_us_per_token": 4.0}
        tables = {"speed": [speed], "profile": [row]}
        return Findings({name: pd.DataFrame(rows) for name, rows in tables.items()}, {"model_hash": "m"}, 1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    found = Measured()
    monkeypatch.setattr(device_sweep, "measure_point", found)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a sweep file of a stock system and of the engine at two budgets."""
    stage = {"notebook": str(NOTEBOOK), "kind": "timing", "metrics": ["tokens_per_s"]}
    stages = [
        stage | {"fixed": {"device": "cuda"}, "grid": {"system": ["stock-grouped_mm"]}},
        stage | {"fixed": {"device": "cuda"}, "grid": {"budget": list(SPEEDS)}, "seconds_per_run": 60},
    ]
    path = tmp_path / "few.yaml"
    path.write_text(yaml.safe_dump({"name": "few", "stages": stages}))
    return path


def taken(runs: Path) -> list[Taken]:
    return take_results(open_store(), runs)


def swept(file: Path, device: str = "cuda", minutes: float = 60) -> SweepOutcome:
    return run_device_sweep(file, device, file.parent / device, minutes, lambda line: None)


def test_records_of_a_gpu_become_the_runs_that_the_sweep_would_have_made(
    bench: Bench, file: Path, measured: Measured
) -> None:
    assert swept(file).recorded == 3
    assert taken(file.parent / "cuda" / "runs") == [Taken("few", 3, 0)]
    assert taken(file.parent / "cuda" / "runs") == [Taken("few", 0, 3)]
    assert [run.finished for run in describe_plan(file).runs] == [True] * 3
    runs = runs_frame("few")
    assert runs["tokens_per_s"].tolist() == [40.0, 50.0, 25.0] and set(runs["status"]) == {"FINISHED"}
    assert runs["budget"].tolist() == ["100%", "100%", "40%"] and runs["tolerance"].tolist() == [0.0] * 3
    assert artifact_frame(runs["run_id"][0], "profile")["operation"].tolist() == ["a|product"]
    record = RunRecord.of(open_store(), open_store().get_run(runs["run_id"][0]))
    assert record.environment["model_hash"] == "m"
    assert record.started_ms == recorded_runs(file.parent / "cuda" / "runs")[0].started_ms


def test_a_rehearsal_is_called_one_everywhere_and_is_no_run_of_the_sweep(
    bench: Bench, file: Path, measured: Measured
) -> None:
    page = swept(file, "cpu").page
    assert page.read_text().startswith("# REHEARSAL on cpu: no figure here is a GPU's")
    records = recorded_runs(page.parent / "runs")
    assert all(record.name.startswith("REHEARSAL on cpu: ") for record in records)
    assert {record.tags[REHEARSAL_TAG] for record in records} == {"cpu"} == {point.device for point in measured.points}
    taken(page.parent / "runs")
    assert not any(run.finished for run in describe_plan(file).runs)
    assert len(runs_frame("few-rehearsal-cpu")) == 3


@pytest.mark.parametrize("measured_here", [True, False])
def test_a_record_without_a_revision_gets_ours_where_its_code_is_ours(
    bench: Bench, file: Path, measured: Measured, measured_here: bool
) -> None:
    runs = swept(file).page.parent / "runs"
    for written in runs.glob("*/run.json"):
        content = json.loads(written.read_text())
        for tag in content["data"]["tags"]:
            if tag["key"] == "env.commit":
                tag["value"] = "unknown"
            elif tag["key"] == CODE_TAG and not measured_here:
                tag["value"] = "another"
        written.write_text(json.dumps(content))
    taken(runs)
    ours = describe_environment().tags()["env.commit"] if measured_here else "unknown"
    assert {item.data.tags["env.commit"] for item in bench.current()} == {ours}


def test_a_later_record_takes_the_place_of_an_earlier_one(bench: Bench, file: Path, measured: Measured) -> None:
    runs = swept(file).page.parent / "runs"
    taken(runs)
    for written in runs.glob("*/run.json"):
        content = json.loads(written.read_text())
        content["info"]["start_time"] += 1000
        written.write_text(json.dumps(content))
    assert taken(runs) == [Taken("few", 3, 0)] and len(runs_frame("few")) == 3


def test_an_interrupted_sweep_goes_on_and_tries_again_what_failed(
    file: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.errors = {"stock-grouped_mm": ExperimentError("out of\nmemory"), "emoe": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        swept(file)
    measured.errors.pop("emoe")
    found = swept(file)
    assert (found.recorded, found.failed, found.left) == (2, 1, 0)
    assert "stock-grouped_mm: out of\nmemory" in found.page.read_text()
    measured.errors.clear()
    before = len(measured.points)
    assert swept(file).recorded == 3 and len(measured.points) == before + 1
    assert swept(file).recorded == 3 and len(measured.points) == before + 1


def test_no_run_is_begun_that_is_expected_to_end_too_late(file: Path, measured: Measured) -> None:
    found = swept(file, minutes=0.9)  # the engine's runs are said to take a minute
    assert (found.recorded, found.left) == (1, 2) and [point.system for point in measured.points] == [
        "stock-grouped_mm"
    ]


def test_no_run_ends_much_later_than_the_time_there_is(file: Path, measured: Measured) -> None:
    swept(file, minutes=0.9)
    assert measured.within_s[0] <= 0.9 * 60 + GRACE_S
    with pytest.raises(ExperimentError, match="too slow"):
        measure_point(DevicePoint(tokens=4, warm_tokens=2, long_prompt_tokens=8), lambda *stage: None, within_s=0.0)


def test_the_page_holds_each_speed_against_its_references(file: Path, measured: Measured) -> None:
    page = swept(file).page.read_text()
    assert "| emoe | 40% | host | 0 | 25 tokens/s | 0.50 | 0.62 | 500 ms |" in page
    assert "| `a/product` | 2.0 | 3.0 | 4.0 |" in page


def test_records_that_are_missing_or_damaged_are_refused(bench: Bench, file: Path, measured: Measured) -> None:
    runs = swept(file).page.parent / "runs"
    with pytest.raises(ExperimentError, match="no recorded runs of 'gpu'"):
        take_results(open_store(), runs, ["gpu"])
    with pytest.raises(ExperimentError, match="holds no recorded runs"):
        taken(file.parent)
    next(iter(runs.glob("*/run.json"))).write_text("{}")
    with pytest.raises(ExperimentError, match="is no record of a run"):
        taken(runs)


def test_the_grid_of_gpus_holds_every_budget_tier_and_tolerance_beside_stock() -> None:
    runs = planned_runs(ROOT / "sweeps" / "gpu.yaml", "cuda")
    points = [DevicePoint(**{k: v for k, v in run.parameters.items() if k != "model"}) for run in runs]
    for shape in ("bench", "olmoe-1b-7b"):
        mine = [point for point in points if point.shape == shape]
        ours = {(point.budget, point.tier, point.tolerance) for point in mine if point.system == "emoe"}
        lossy = {(f"{share}%", tier, 1.0) for share in (60, 40, 20) for tier in ("host", "disk")}
        assert ours == lossy | {(f"{share}%", tier, 0.0) for share in (100, 60, 40, 20) for tier in ("host", "disk")}
        assert {point.system for point in mine} == {"emoe", "stock-eager", "stock-grouped_mm"}
    assert {(point.prompt_tokens, point.long_prompt_tokens) for point in points} == {(64, 2048)}


def test_the_notebook_takes_the_fields_of_a_point() -> None:
    assert set(notebook_parameters(NOTEBOOK)) == {item.name for item in fields(DevicePoint)} - {"max_seconds"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"system": "llama.cpp"}, "unknown system"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 2, "profiled_tokens": 3}, "at most tokens, 2"),
        ({"tier": "cloud"}, "tier"),
        ({"device": "tpu"}, "device 'tpu'"),
    ],
)
def test_impossible_points_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DevicePoint(**settings)


@pytest.mark.parametrize("adapter", ["emoe", "stock"])
def test_the_job_measures_what_the_catalogue_knows(adapter: str, tmp_path: Path) -> None:
    checkpoint = tiny_moe(tmp_path / "model", "olmoe")
    options = {"budget": "100%", "tier": "host"} if adapter == "emoe" else {"experts_implementation": "grouped_mm"}
    beyond = {"device": "cpu", "joins": [], "long_prompt": list(range(20)), "profiled_tokens": 2}
    found = measure_on_device(spec_of(checkpoint, adapter, **options) | beyond)
    metrics = metrics_of(found)
    assert not [name for name in metrics if not metric_of(name).meaning]
    assert metrics["tokens_per_s"] > 0 and metrics["long_ttft_s"] > 0 and metrics["memcpy_bytes_per_s"] > 0
    assert ("fill_share" in metrics) == (adapter == "emoe") and "host_waits_per_token" not in metrics
    assert any(row["operation"] == "aten::mm" and row["host_us_per_token"] > 0 for row in found["profile"])


def test_waits_that_an_engine_counts_are_told_per_timed_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Engine, "host_waits", property(lambda engine: 3 * engine.stats().counters.forwards), raising=False
    )
    beyond = {"device": "cpu", "joins": [], "long_prompt": [1, 2], "profiled_tokens": 1}
    found = measure_on_device(spec_of(tiny_moe(tmp_path / "model", "olmoe"), budget="50%") | beyond)
    assert metrics_of(found)["engine_waits_per_token"] == 3


@pytest.mark.parametrize("adapter", ["emoe", "stock"])
def test_a_system_runs_on_the_device_of_its_spec_or_not_at_all(adapter: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, adapter, **({"experts_implementation": "eager"} if adapter == "stock" else {}))
    checkpoint = tiny_moe(tmp_path / "model", "olmoe")
    with pytest.raises(OptionError, match="'cuda:9'"):
        decoder_class(adapter)(spec | {"checkpoint": str(checkpoint), "device": "cuda:9"})


def test_without_a_gpu_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(gpu.STARTED, "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "run", "--out", str(tmp_path / "out")])
    assert gpu.main() == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "rehearse with DEVICE=cpu" in said
