"""The engine's timeline, the spans made of it, and the traces that MLflow keeps: each tells what really happened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sweep_bench import Bench

import emoe_core
from workbench.models.reference.tiny import LAYERS, tiny_moe
from workbench.tracking import run as tracking
from workbench.tracking.store import open_store
from workbench.tracking.traces import Span, request_spans

PROMPTS = ["What is a heron?", "Count to ten."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("timeline"), family="mixtral", seed=9)


def load(model: Path, tmp_path: Path, **options) -> emoe_core.Engine:
    return emoe_core.load(model, **({"budget": "2 slots", "pack_dir": tmp_path} | options))


def named(root: Span, name: str) -> list[Span]:
    return [span for span in root.walk() if span.name == name]


def test_an_engine_without_a_timeline_records_nothing(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path) as engine:
        with engine.timeline() as timeline:
            pass
        engine.generate(PROMPTS[:1], max_new_tokens=2)
        assert timeline.events == []
        assert (engine.loader.timeline, engine.control.timeline, engine.passes.timeline) == (None, None, None)


def test_a_timeline_agrees_with_the_counters(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, tolerance=0.0, predictor=None) as engine:
        before = engine.stats().counters
        with engine.timeline() as timeline:
            engine.generate(PROMPTS, max_new_tokens=4)
        counters = engine.stats().counters.since(before)
    loads, stalls = timeline.of("load"), timeline.of("stall")
    assert len(loads) == counters.loads > 0
    assert sum(event.details["bytes"] for event in loads) == counters.bytes_loaded
    assert sum(event.seconds for event in stalls) == pytest.approx(counters.stall_s, rel=0.2, abs=2e-3)
    assert len(timeline.of("pass")) == counters.forwards
    assert [event.details["request"] for event in timeline.of("request")] == [0, 1]


def test_a_timeline_changes_no_answer(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path) as engine:
        plain = engine.generate(PROMPTS[:1], max_new_tokens=6)[0].token_ids
    with load(model, tmp_path) as engine, engine.timeline():
        assert engine.generate(PROMPTS[:1], max_new_tokens=6)[0].token_ids == plain


def test_spans_nest_and_account_for_passes_predictions_and_loads(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, tolerance=1.0, predictor="frequency", interval=1) as engine:
        engine.generate(PROMPTS[1:], max_new_tokens=3)
        with engine.timeline() as timeline:
            answers = engine.generate(PROMPTS, max_new_tokens=5)
    roots = request_spans(timeline, {answers[0].request: PROMPTS[0]}, {answers[0].request: answers[0].text})
    assert [root.attributes["request"] for root in roots] == [answer.request for answer in answers]
    assert (roots[0].inputs, roots[0].outputs, roots[1].inputs) == (PROMPTS[0], answers[0].text, None)
    for root, answer in zip(roots, answers, strict=True):
        assert len(named(root, "prediction")) == 1 and len(named(root, "prefill")) == 1
        decode = named(root, "decode")[0]
        assert [span.name for span in decode.children] == [f"token {n}" for n in range(2, len(answer.token_ids) + 1)]
        assert root.attributes["compute_s"] + root.attributes["stall_s"] <= root.ended_s - root.started_s
        told = [span for span in root.walk() if span.kind == "TOOL"]
        assert sum(len(span.attributes["experts"]) for span in told) == root.attributes["loads"]
        assert len([span for span in named(root, "prefill")[0].children]) <= LAYERS
        for span in root.walk():
            assert root.started_s <= span.started_s <= span.ended_s


def test_a_batch_is_one_set_of_passes_and_a_span_for_each_request(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path) as engine, engine.timeline() as timeline:
        engine.generate(PROMPTS, max_new_tokens=3, batch_size=2)
    roots = request_spans(timeline)
    assert len(roots) == 2
    assert [len(named(root, "prefill")) for root in roots] == [1, 1]
    assert named(roots[0], "prefill")[0].started_s == named(roots[1], "prefill")[0].started_s


def test_traces_lie_beside_their_run(bench: Bench, model: Path, tmp_path: Path) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    with load(model, tmp_path) as engine, engine.timeline() as timeline:
        answer = engine.generate(PROMPTS[:1], max_new_tokens=3)[0]
    roots = request_spans(timeline, {answer.request: {"prompt": PROMPTS[0]}}, {answer.request: answer.text})
    with tracking.run("by hand", "traced") as run:
        ids = run.log_traces(roots)
    client = open_store()
    experiment = client.get_run(run.run_id).info.experiment_id
    found = client.search_traces(locations=[experiment], run_id=run.run_id)
    assert [trace.info.trace_id for trace in found] == ids
    spans = {span.name: span for span in found[0].data.spans}
    assert len(found[0].data.spans) == len(list(roots[0].walk()))
    assert spans["request"].inputs == {"prompt": PROMPTS[0]} and spans["request"].outputs == answer.text
    assert spans["prefill"].parent_id == spans["request"].span_id
    assert spans["prefill"].attributes["compute_s"] > 0
    taken_s = (spans["request"].end_time_ns - spans["request"].start_time_ns) / 1e9
    assert taken_s == pytest.approx(roots[0].ended_s - roots[0].started_s, abs=1e-4)
    assert mlflow.get_tracking_uri() == before
    assert "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING" not in os.environ
