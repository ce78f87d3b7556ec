"""Promises of arrivals: rates and bursts as asked for, traces as recorded, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from serving_bench import make_costs, two_tasks

from emoe_core.errors import DataError, OptionError
from workbench.serving.simulation.arrivals import Arrival, at_rate, draw_arrivals
from workbench.serving.simulation.experiment import ServingConfig, make_arrivals, simulate_serving
from workbench.serving.simulation.request_traces import RequestTrace, merge, read_trace, trace_path

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,0
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 646, "output_length": 26, "hash_ids": [46]}
"""


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_variation_asked_for(burstiness: float) -> None:
    moments = [one.arrival_s for one in draw_arrivals(two_tasks(), 20_000, 4.0, burstiness=burstiness, seed=1)]
    gaps = np.diff(moments)
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.05)


def test_tasks_are_mixed_evenly_and_lengths_are_the_tasks_own() -> None:
    drawn = draw_arrivals(two_tasks(), 4000, 1.0, seed=0)
    assert [one.number for one in drawn] == list(range(4000))
    assert np.mean([one.task == "qa" for one in drawn]) == pytest.approx(0.5, abs=0.03)
    for task, load in two_tasks().items():
        mine = [one for one in drawn if one.task == task]
        assert {one.input_tokens for one in mine} == set(load.input_tokens)
        assert {one.output_tokens for one in mine} == set(load.output_tokens)


def test_a_rate_changes_only_when_requests_come() -> None:
    slow, fast = (draw_arrivals(two_tasks(), 50, rate, seed=5) for rate in (1.0, 10.0))
    assert [one.arrival_s for one in slow] == pytest.approx([10 * one.arrival_s for one in fast])
    assert [(a.task, a.input_tokens, a.output_tokens) for a in slow] == [
        (b.task, b.input_tokens, b.output_tokens) for b in fast
    ]
    assert draw_arrivals(two_tasks(), 50, 1.0, seed=5) == slow != draw_arrivals(two_tasks(), 50, 1.0, seed=6)


def test_time_is_stretched_to_a_rate() -> None:
    recorded = [Arrival(n, "qa", moment, 1, 1) for n, moment in enumerate((5.0, 6.0, 9.0))]
    assert [one.arrival_s for one in at_rate(recorded, 2.0)] == pytest.approx([0.0, 0.25, 1.0])
    with pytest.raises(OptionError, match="at one moment"):
        at_rate(recorded[:1], 2.0)
    with pytest.raises(OptionError, match="makes no sense"):
        at_rate(recorded, 0.0)


def test_azures_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "azure_llm_2023_conv.csv"
    path.write_text(AZURE)
    trace = read_trace(path, ["code", "conversation", "qa"], max_input_tokens=400, max_output_tokens=50)
    assert [one.arrival_s for one in trace.arrivals] == pytest.approx([0.0, 4.314579, 4.541877])
    assert [(one.input_tokens, one.output_tokens) for one in trace.arrivals] == [(374, 44), (396, 50), (400, 1)]
    assert trace.cut == 2 and {one.task for one in trace.arrivals} == {"conversation"}
    assert len(read_trace(path, ["qa"], most=2).arrivals) == 2


def test_mooncakes_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE)
    trace = read_trace(path, ["qa"])
    assert trace.arrivals == [Arrival(0, "qa", 0.0, 6955, 52), Arrival(1, "qa", pytest.approx(3.053), 646, 26)]  # type: ignore[arg-type]
    assert trace.cut == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "time,tokens\n1,2\n", "first line should be TIMESTAMP"),
        ("a.csv", AZURE + "2023-11-16 18:15:59,many,4\n", "line 5"),
        ("a.csv", AZURE.splitlines()[0] + "\n", "no requests"),
        ("a.jsonl", MOONCAKE + "{}\n", "line 3"),
        ("a.jsonl", "not json\n", "line 1"),
    ],
)
def test_a_damaged_trace_is_refused_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_trace(tmp_path / name, ["qa"])


def test_a_missing_trace_says_where_to_put_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"traces/azure_llm_2023_conv\.csv: put AzureLLMInferenceTrace_conv\.csv"):
        trace_path("azure_conv")
    with pytest.raises(DataError, match="no request trace at /no/such"):
        trace_path("/no/such.csv")
    (tmp_path / "mooncake_trace.jsonl").write_text(MOONCAKE)
    assert trace_path("mooncake", tmp_path) == tmp_path / "mooncake_trace.jsonl"


def test_traces_are_merged_in_order_of_arrival() -> None:
    conversation = RequestTrace([Arrival(0, "conversation", 0.0, 1, 1), Arrival(1, "conversation", 4.0, 1, 1)], 1)
    code = RequestTrace([Arrival(0, "code", 1.0, 2, 2)], 2)
    both = merge([conversation, code])
    assert [(one.number, one.task) for one in both.arrivals] == [(0, "conversation"), (1, "code"), (2, "conversation")]
    assert both.cut == 3


def test_a_trace_is_served_at_its_own_rate_or_at_a_load(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(AZURE)
    own = ServingConfig(arrivals=str(path), load=None, max_input_tokens=64, max_output_tokens=16)
    assert [one.arrival_s for one in make_arrivals(own, make_costs())] == pytest.approx([0.0, 4.314579, 4.541877])
    result = simulate_serving(ServingConfig(arrivals=str(path), load=0.5, max_output_tokens=16), make_costs())
    assert result.metrics["requests"] == 3
    assert result.metrics["rate_per_s"] == pytest.approx(0.5 * result.metrics["capacity_per_s"])


@pytest.mark.parametrize(("count", "rate"), [(0, 1.0), (3, 0.0)])
def test_impossible_arrivals_are_refused(count: int, rate: float) -> None:
    with pytest.raises(OptionError):
        draw_arrivals(two_tasks(), count, rate)
