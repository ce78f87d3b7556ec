"""Promises of training from recorded routing: where predictors rest, how they are found, and how large they may be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import emoe_core
from emoe_core.errors import OptionError, PredictorError
from emoe_core.experts.trace import RoutingTrace
from emoe_core.planning.tasks import UNKNOWN
from workbench.cli import app
from workbench.models.reference.tiny import EXPERTS, LAYERS, TOP_K, tiny_moe
from workbench.quality.configuration import ExperimentConfig
from workbench.quality.experiment import run_experiment
from workbench.replay.predictor_training import predictor_path, stored_predictor
from workbench.replay.recording import Recording, RecordingConfig, from_trace, record

RECORDED = {"source": "fixture", "max_new_tokens": 2}
OPTIONS = ["--prompts", "60", "--source", "fixture", "--max-new-tokens", "2", "--epochs", "2", "--depth", "1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("cache")
        patch.setenv("EMOE_CACHE", str(root))
        yield root


@pytest.fixture(scope="module")
def checkpoint(cache: Path) -> Path:
    return tiny_moe(cache / "model", seed=1)


@pytest.fixture(scope="module")
def recording(checkpoint: Path) -> Recording:
    return record(RecordingConfig(str(checkpoint), warm_prompts=60, n_prompts=5, **RECORDED))


def test_a_recording_has_a_warm_up_and_a_stream_for_each_order(recording: Recording) -> None:
    assert recording.shape == (LAYERS, EXPERTS) and recording.top_k == TOP_K
    assert len(recording.warm) == 60
    assert {mix: len(stream) for mix, stream in recording.streams.items()} == {"sticky": 5, "uniform": 5}
    use = recording.warm[0]
    assert use.counts.sum() == use.tokens * LAYERS * TOP_K
    with pytest.raises(OptionError, match="warm_prompts"):
        RecordingConfig(warm_prompts=-1)


def test_an_unlabelled_stream_is_the_same_stream_without_its_task_types(checkpoint: Path) -> None:
    config = RecordingConfig(
        str(checkpoint), warm_prompts=0, n_prompts=6, mixes=("drift",), unlabelled=("drift",), **RECORDED
    )
    streams = record(config).streams
    assert list(streams) == ["drift", "drift-unlabelled"]
    labelled, plain = streams.values()
    assert {use.task for use in plain} == {UNKNOWN} and UNKNOWN not in {use.task for use in labelled}
    assert all((one.counts == other.counts).all() for one, other in zip(labelled, plain, strict=True))
    with pytest.raises(OptionError, match="unknown mix"):
        RecordingConfig(mixes=("drifting",))
    with pytest.raises(OptionError, match="not drift"):
        RecordingConfig(unlabelled=("drift",))


def test_a_user_s_own_routing_is_replayed_half_as_history(checkpoint: Path, tmp_path: Path) -> None:
    with emoe_core.load(checkpoint, budget="100%", record=True) as engine:
        engine.generate([f"Question {i}?" for i in range(5)], max_new_tokens=2, tasks=["qa"] * 5)
        file = engine.trace().save(tmp_path / "mine.npz")
    own = from_trace(str(checkpoint), RoutingTrace.load(file))
    assert len(own.warm) == 2 and len(own.streams["trace"]) == 3
    shown = CliRunner().invoke(app, ["predictor", "evaluate", str(checkpoint), "--trace", str(file)])
    assert shown.exit_code == 0, shown.exception
    assert "Best on mine.npz:" in shown.output
    trace = RoutingTrace.load(file)
    with pytest.raises(OptionError, match=f"{LAYERS} layers of {EXPERTS + 1} experts.*has {LAYERS} of {EXPERTS}"):
        from_trace(str(checkpoint), replace(trace, experts=EXPERTS + 1))
    with pytest.raises(OptionError, match="at least two"):
        from_trace(str(checkpoint), replace(trace, tasks={0: "qa"}))


def test_training_refuses_a_predictor_too_large_for_its_model(checkpoint: Path, recording: Recording) -> None:
    path = predictor_path(recording.model_hash)
    before = path.read_bytes() if path.exists() else None
    found = CliRunner().invoke(app, ["predictor", "train", str(checkpoint), *OPTIONS, "--width", "64"])
    assert isinstance(found.exception, PredictorError)
    assert "give a smaller width" in str(found.exception)
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_model_without_a_predictor_is_told_how_to_get_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    with pytest.raises(PredictorError, match="emoe predictor train"):
        stored_predictor(checkpoint)


def test_what_cannot_work_is_refused_before_anything_is_recorded(checkpoint: Path) -> None:
    found = CliRunner().invoke(app, ["predictor", "evaluate", str(checkpoint), "--slots", "99", "--source", "hub"])
    assert isinstance(found.exception, OptionError) and "--slots 99" in str(found.exception)


def test_a_trained_predictor_is_found_compared_and_used(checkpoint: Path, recording: Recording) -> None:
    found = CliRunner().invoke(app, ["predictor", "train", str(checkpoint), *OPTIONS, "--width", "8"])
    assert found.exit_code == 0, found.exception
    assert stored_predictor(checkpoint) == predictor_path(recording.model_hash)
    evaluate = ["evaluate", str(checkpoint), "--prompts", "5", "--warm-prompts", "60", "--slots", "3", *OPTIONS[2:6]]
    shown = CliRunner().invoke(app, ["predictor", *evaluate], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.exception
    assert "transformer A" in shown.output and "oracle" in shown.output
    config = ExperimentConfig(
        str(checkpoint), "3 slots", strategy="transformer", n_prompts=2, warm_prompts=0, interval=1, **RECORDED
    )
    result = run_experiment(config)
    assert result.stats["predictor"] == "transformer"
    assert result.metrics["swaps"] >= 1 and not result.stats["cold_start"]
