"""Two recorded runs or sweeps against each other, from a real store."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_bench import Bench
from typer.testing import CliRunner

from emoe_core.errors import ExperimentError
from workbench.cli import app
from workbench.compare.change import paired_change
from workbench.compare.differences import environment_differences, parameter_differences
from workbench.compare.runs import RunComparison, compare_runs
from workbench.compare.short import short_tables
from workbench.compare.sweeps import compare_sweeps
from workbench.compare.view import view_runs, view_sweeps
from workbench.machine import environment
from workbench.sweep.resume import start_parent
from workbench.tracking import run as tracking
from workbench.tracking.run import PARENT_TAG
from workbench.tracking.run_lookup import find_run, find_runs
from workbench.tracking.runs import METRICS_TAG, NOTEBOOK_TAG, PAGE_CACHE_TAG
from workbench.tracking.store import open_store

PROMPTS = 12
COLD, WARM = "bypassed (direct reads)", "packed file /x, buffered reads (no O_DIRECT)"


def requests(loss: float = 0.0, *, first: int = 0, count: int = PROMPTS, scored: str = "s") -> pd.DataFrame:
    """Return a table of prompts in which every prompt is hard by itself, and `loss` worse than that."""
    place = np.arange(first, first + count)
    hard = np.sin(place) ** 2
    return pd.DataFrame(
        {
            "request": place - first,
            "task": "qa",
            "prompt_tokens": 10 + place,
            "output_tokens": 4 + place % 3,
            "log_ratio_nats": hard + loss * (1 + 0.1 * np.cos(place)),
            "kl_nats": hard + loss,
            "loads": 3 * place,
            "prompt_hash": [f"p{number}" for number in place],
            "scored_hash": [f"{scored}{number}" for number in place],
        }
    )


@pytest.fixture(autouse=True)
def committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record runs as of one commit: what the working tree is like while tests run must not be a difference."""
    monkeypatch.setattr(environment, "git_revision", lambda: ("c0ffee", False))


def record(
    name: str,
    *,
    frame: pd.DataFrame | None = None,
    metrics: dict[str, float] | None = None,
    tags: dict[str, str] | None = None,
    params: dict[str, Any] | None = None,
    experiment: str = "tests",
    **identity: Any,
) -> str:
    """Record a finished run in the store and return its id."""
    same = {"model_hash": "m", "data_hash": "d", "reference_hash": "r", "seed": 0}
    with tracking.run(experiment, name, params=params or {}, tags=tags or {}, **(same | identity)) as run:
        run.log_metrics(metrics or {"hit_rate": 0.5})
        if frame is not None:
            run.log_frame("requests", frame)
    return run.run_id


def compared(a: str, b: str, **options: Any) -> RunComparison:
    client = open_store()
    return compare_runs(find_run(client, a), find_run(client, b), **options)


def whats(found: list[Any]) -> set[str]:
    return {item.what for item in found}


def test_pairing_sees_what_hard_prompts_would_hide(bench: Bench) -> None:
    a, b = record("a", frame=requests()), record("b", frame=requests(0.02), params={"budget": "40%"})
    found = {change.metric: change for change in compared(a, b).over_prompts}
    change = found["perplexity_ratio"]
    assert change.pairs == PROMPTS
    assert 0.015 < change.low / change.a < change.high / change.a < 0.025
    assert change.ratio == pytest.approx(change.b / change.a) and change.ratio_low > 1.015
    assert change.verdict == "B is higher, worse"
    assert found["loads"].verdict == "equal"
    unpaired = np.std(np.exp(requests()["log_ratio_nats"])) / np.sqrt(PROMPTS)
    assert change.high - change.low < unpaired


def test_no_difference_is_said_plainly(bench: Bench) -> None:
    frame = requests()
    frame["kl_nats"] += 0.1 * np.where(np.arange(PROMPTS) % 2, 1, -1)
    found = compared(record("a", frame=requests()), record("b", frame=frame))
    assert {c.metric: c.verdict for c in found.over_prompts}["kl_nats"] == "no difference can be told"


def test_few_prompts_get_no_interval(bench: Bench) -> None:
    found = compared(record("a", frame=requests(count=3)), record("b", frame=requests(0.1, count=3)))
    change = found.over_prompts[0]
    assert np.isnan(change.low) and change.verdict == "3 pairs, too few for an interval"
    assert change.to_dict()["low"] is None


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), min_size=8, max_size=30))
def test_swapping_a_and_b_turns_the_interval_around(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    there, back = paired_change("x", a, b, geometric=True), paired_change("x", b, a, geometric=True)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    assert there.ratio * back.ratio == pytest.approx(1)
    assert there.ratio_low * back.ratio_high == pytest.approx(1)
    assert there.low <= there.high and there.ratio_low <= there.ratio_high


def test_streams_of_other_lengths_are_paired_by_prompt_and_not_by_place(bench: Bench) -> None:
    a = record("a", frame=requests(), data_hash="d1")
    b = record("b", frame=requests(0.5, first=4), data_hash="d2")
    found = compared(a, b)
    loads = next(change for change in found.over_prompts if change.metric == "loads")
    assert (loads.pairs, loads.verdict) == (PROMPTS - 4, "equal")
    assert "requests: 8 pairs of 12 rows in A and 12 in B." in found.remarks
    assert "requests: 8 pairs came after other prompts in A than in B, so slots may have differed." in found.remarks
    assert "data" in whats(found.others) and "quality" in found.doubted


def test_pairs_of_the_same_prompt_are_not_doubted_for_other_prompts(bench: Bench) -> None:
    a = record("a", frame=requests(), data_hash="d1")
    b = record("b", frame=requests(0.5, count=2 * PROMPTS), data_hash="d2")
    found = compared(a, b)
    assert found.doubted_over_prompts == set() and "quality" in found.doubted
    told = found.to_dict()
    assert [change["doubtful"] for change in told["over_prompts"]] == [False] * len(found.over_prompts)
    assert {change["metric"]: change["doubtful"] for change in told["single"]} == {"hit_rate": True}
    assert [item.doubt for item in found.others] == ["everything not paired by prompt: other prompts"]
    assert "after other prompts" not in " ".join(found.remarks), "the longer stream begins as the shorter one"
    paired, _ = (rows for _, rows in view_runs(found).tables)
    assert "doubtful" not in " ".join(row.cells[-1] for row in paired)
    # What doubts the pairs themselves still does.
    other = compared(a, record("c", frame=requests(0.5, count=PROMPTS - 1), data_hash="d3", model_hash="m2"))
    assert all(change["doubtful"] for change in other.to_dict()["over_prompts"] if not change["identical"])


def test_sweeps_over_other_streams_are_doubted_where_they_are_not_paired_by_prompt(bench: Bench) -> None:
    sweep("a", ["10%", "20%"], 0.0, identity={"data_hash": "d1"})
    sweep("b", ["10%", "20%"], 0.05, identity={"data_hash": "d2"})
    found = compare_sweeps(*(find_runs(open_store(), name) for name in "ab"))
    doubtful = {change["metric"]: change["doubtful"] for change in found.to_dict()["over_pairs"]["book"]}
    assert doubtful["perplexity_ratio"] is False and doubtful["bytes_loaded"] is True


def test_prompts_without_hashes_are_paired_by_place_only_in_the_same_data(bench: Bench) -> None:
    old = requests().drop(columns=["prompt_hash", "scored_hash"])
    a, b = record("a", frame=old), record("b", frame=old)
    other = record("c", frame=old, data_hash="d2")
    assert compared(a, b).over_prompts[0].pairs == PROMPTS
    found = compared(a, other)
    assert not found.over_prompts
    assert "the runs had other data, and the tables have no complete column `prompt_hash`" in found.remarks[0]


def test_prompts_without_hashes_are_paired_by_their_text(bench: Bench) -> None:
    """Also where pandas reads text as a type of its own, which numpy does not know."""
    old = requests().drop(columns=["prompt_hash", "scored_hash"])
    told = old.assign(prompt=pd.array([f"prompt {place}" for place in range(len(old))], dtype="str"))
    a, b = record("a", frame=told), record("b", frame=told.iloc[::-1].reset_index(drop=True), data_hash="d2")
    assert compared(a, b).over_prompts[0].pairs == PROMPTS


def test_what_a_table_lacks_for_pairing_is_said(bench: Bench) -> None:
    bare = requests().drop(columns=["prompt_hash", "request"])
    gaps = requests().drop(columns="request").assign(prompt_hash=[None, *requests()["prompt_hash"][1:]])
    own = record("own", frame=bare)

    def remark(frame: pd.DataFrame, **identity: Any) -> str:
        return compared(own, record("other", frame=frame, **identity)).remarks[0]

    same = "requests: prompts cannot be paired: the data are the same, but "
    assert remark(bare).startswith(f"{same}the tables have no complete column `request` or `prompt_hash`: record one")
    assert remark(requests()).startswith(f"{same}the table of A has no complete column `request` or `prompt_hash`")
    assert "the tables have no complete column" in remark(gaps)
    assert "the runs had other data, and the table of A has no" in remark(requests(), data_hash="d2")
    assert "a run does not record its data (data_hash)" in remark(requests(), data_hash=None)


def test_quality_on_other_continuations_is_left_out(bench: Bench) -> None:
    a, b = record("a", frame=requests()), record("b", frame=requests(scored="other"), reference_hash="r2")
    found = compared(a, b)
    assert [change.metric for change in found.over_prompts] == ["loads"]
    assert f"quality leaves out {PROMPTS} pairs" in found.remarks[0]
    assert "reference" in whats(found.others)


def test_variants_of_a_notebook_are_paired_apart(bench: Bench) -> None:
    both = [pd.concat([requests(x).assign(label="lru"), requests(y).assign(label="mine")]) for x, y in ((0, 0), (0, 1))]
    found = compared(record("a", frame=both[0]), record("b", frame=both[1]))
    verdicts = {(c.variant, c.metric): c.verdict for c in found.over_prompts}
    assert verdicts["lru", "kl_nats"] == "equal" and verdicts["mine", "kl_nats"] == "B is higher, worse"


def test_warm_is_not_compared_with_cold(bench: Bench) -> None:
    times = {"tpot_s": 0.1, "hit_rate": 0.5}
    cold = record("cold run", metrics=times, tags={PAGE_CACHE_TAG: COLD})
    warm = record("warm run", metrics=times | {"tpot_s": 0.02}, tags={PAGE_CACHE_TAG: WARM})
    with pytest.raises(ExperimentError, match=r"cold run .* from the disk \(cold\), warm run .*--without-times"):
        compared(warm, cold)
    kept = compared(warm, cold, without_times=True)
    assert [change.metric for change in kept.single] == ["hit_rate"]
    unsaid = compared(record("unsaid", metrics=times), cold)
    assert "reading experts" in whats(unsaid.others) and unsaid.doubted == {"time"}


def test_times_of_a_busy_machine_are_doubtful(bench: Bench) -> None:
    quiet = record("quiet", metrics={"tpot_s": 0.1, "others_cpu_share": 0.01})
    busy = record("busy", metrics={"tpot_s": 0.2, "others_cpu_share": 0.6})
    found = compared(quiet, busy)
    assert found.doubted == {"time"}
    assert found.to_dict()["single"][0]["doubtful"] is True


def test_what_differs_is_named_with_what_it_makes_doubtful(bench: Bench) -> None:
    a = record("a", params={"budget": "20%", "seed": 0})
    b = record("b", params={"budget": "40%", "only": 1}, seed=1, model_hash="m2")
    client = open_store()
    runs = find_run(client, a), find_run(client, b)
    assert whats(parameter_differences(*runs)) == {"budget", "seed", "only"}
    recorded = runs[0].environment
    changes = {"threads": 64, "packages": recorded["packages"] | {"torch": "0.1", "mlflow": "0.2"}, "cpu": "abacus"}
    doubts = {item.what: item.doubts for item in environment_differences(recorded, recorded | changes)}
    assert set(doubts) == {"threads", "torch", "mlflow", "processor"}
    assert "time" in doubts["threads"] and "quality" in doubts["torch"] and doubts["mlflow"] == ()
    assert {"seed", "model"} <= whats(compared(a, b).others)
    assert environment_differences(recorded, recorded) == []
    assert whats(environment_differences(recorded, recorded | {"dirty": True})) == {"code"}
    assert whats(environment_differences(recorded, {})) == {"environment"}


def test_runs_are_found_by_id_prefix_name_and_sweep(bench: Bench) -> None:
    client = open_store()
    first, second = record("one"), record("twice")
    record("twice")
    assert find_run(client, first).run_id == find_run(client, first[:12]).run_id == find_run(client, "one").run_id
    with pytest.raises(ExperimentError, match=rf"(?s)'twice' names 2 runs; give the start of an id.*{second}"):
        find_run(client, "twice")
    start_parent(client, "swept", {})
    assert find_runs(client, "swept").is_sweep
    with pytest.raises(ExperimentError, match="'swept' is a sweep; name one of its runs"):
        find_run(client, "swept")
    for nonsense in ("nothing", "", "o'ne", "ffffffffff", "%"):
        with pytest.raises(ExperimentError, match=r"has no run or sweep .*Sweeps: swept"):
            find_runs(client, nonsense)


def sweep(name: str, budgets: list[str], loss: float, identity: dict[str, str] | None = None, **fixed: Any) -> None:
    """Record a sweep of runs that lose `loss` more than others."""
    parent = start_parent(open_store(), name, {})
    for place, budget in enumerate(budgets):
        tags = {
            **{NOTEBOOK_TAG: "book", METRICS_TAG: "perplexity_ratio,bytes_loaded"},
            **{PARENT_TAG: parent, "emoe.index": str(place)},
        }
        metrics = {"bytes_loaded": 10.0 ** (place + 3) * (1 + loss), "hit_rate": 0.5}
        params = {"budget": budget, **fixed}
        record(
            f"{name} {budget}",
            **{"experiment": name, "frame": requests(loss), "metrics": metrics, "tags": tags, "params": params},
            **identity or {},
        )


def test_sweeps_are_paired_by_parameters_but_for_those_that_tell_them_apart(bench: Bench) -> None:
    budgets = ["10%", "20%", "30%"]
    sweep("a", budgets, 0.0, model="reference")
    sweep("b", [*budgets[1:], "95%"], 0.05, model="carved")
    client = open_store()
    found = compare_sweeps(find_runs(client, "a"), find_runs(client, "b"))
    assert [(item.what, count) for item, count in found.parameters] == [("model", 2)]
    assert found.unpaired == ["A: a 10% has no partner", "B: b 95% has no partner"]
    assert len(found.pairs) == 2 and all(p.a.params["budget"] == p.b.params["budget"] for p in found.pairs)
    tables = dict(view_sweeps(found).tables)
    assert [row.cells[0] for row in tables["a 20%"]] == ["perplexity ratio", "bytes loaded"]
    sweep("c", budgets, 0.05, model="reference")
    whole = compare_sweeps(find_runs(client, "a"), find_runs(client, "c"))
    changes = {change.metric: change for change in whole.notebooks["book"]}
    # The largest configuration does not decide the ratio.
    assert changes["bytes_loaded"].ratio == pytest.approx(1.05) and changes["bytes_loaded"].pairs == 3
    assert json.loads(json.dumps(whole.to_dict()))["pairs"][0]["over_prompts"]


def test_a_run_is_not_compared_with_itself_nor_one_that_failed(bench: Bench) -> None:
    a = record("a")
    with pytest.raises(ExperimentError, match="are the same run"):
        compared(a, a)
    with pytest.raises(ZeroDivisionError), tracking.run("tests", "broken"):
        raise ZeroDivisionError
    with pytest.raises(ExperimentError, match=r"broken .* is failed: only finished runs"):
        compared(a, "broken")
    with pytest.raises(ExperimentError, match=r"no metric 'speed' is in both\. Metrics of both: hit_rate"):
        compared(a, record("b"), metrics=["speed"])


def test_a_sweep_beside_itself_is_called_a_sweep(bench: Bench) -> None:
    sweep("a", ["10%"], 0.0)
    twice = [find_runs(open_store(), "a") for _ in range(2)]
    with pytest.raises(ExperimentError, match=r"A and B are the same sweep: sweep a \(.*, 1 runs\. Name two"):
        compare_sweeps(*twice)


def test_metrics_are_named_as_tables_show_them(bench: Bench) -> None:
    times = {"fresh_ttft_s": 0.1, "stock_ttft_s": 0.1, "slot_bytes": 1.0, "slot_share": 0.4, "load_s": 1.0}
    metrics = times | {"load_bytes": 2.0, "evictions": 3.0}
    a, b = (record(name, metrics=metrics, frame=requests()) for name in "ab")

    def named(text: str, **options: Any) -> set[str]:
        return compared(a, b, metrics=[text], **options).metrics

    for text, name in {"kl": "kl_nats", "slot": "slot_bytes", "Fresh TTFT": "fresh_ttft_s", "load s": "load_s"}.items():
        assert named(text) == {name}
    assert named("load_bytes") == {"load_bytes"}
    with pytest.raises(ExperimentError, match="'load' stands for load_bytes and load_s: give one"):
        named("load")
    assert named("load", without_times=True) == {"load_bytes"}
    with pytest.raises(ExperimentError, match=r"no metric 'evicitons' is in both\. Did you mean 'evictions'\?$"):
        named("evicitons")
    with pytest.raises(ExperimentError, match=r"Did you mean 'fresh_ttft_s' or 'stock_ttft_s'\?$"):
        named("ttft")
    with pytest.raises(ExperimentError, match=r"Did you mean 'fresh_ttft_s' or 'stock_ttft_s'\?$"):
        named("tfft")
    with pytest.raises(ExperimentError, match="give --all to see them"):
        named("qqq")
    sweep("s", ["10%"], 0.0)
    sweep("t", ["10%"], 0.1)
    found = compare_sweeps(*(find_runs(open_store(), name) for name in "st"), metrics=["kl"])
    assert [change.metric for change in found.notebooks["book"]] == ["kl_nats"]


def test_the_terminal_shows_what_differs_and_all_shows_the_rest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    same = {"slot_bytes": 4e9, "perplexity_ratio": 1.0, "perplexity_ratio_low": 0.5, "swap_s": 9.0}
    first = {"evictions": 3.0, "fresh_peak_bytes": 1e9, "tpot_s": 0.1, "tpot_spread_s": 1.0, "ttft_spread_s": 1.0}
    second = {"evictions": 5.0, "fresh_peak_bytes": 1.001e9, "tpot_s": 0.2, "tpot_spread_s": 2.0, "ttft_spread_s": 2.0}
    a = record("a", metrics=same | first, frame=requests())
    b = record("b", metrics=same | second | {"perplexity_ratio_low": 0.6}, frame=requests(0.1))

    def emoe(*options: str) -> str:
        return CliRunner().invoke(app, ["compare", a, b, *options]).output

    short, whole = emoe(), emoe("--all")
    assert "One value a run: no interval" in short
    assert "one value each" not in short and "perplexity ratio low" not in short
    assert (
        "B is higher" in short and "Equal in both: loads" in short and "slot 4 GB" in short.split("Equal in both")[-1]
    )
    assert "less than 1% apart (A is shown): fresh peak 1 GB" in short
    assert "ttft spread" in short and "tpot spread" not in short, "left out only where the metric is there"
    for words in ("one value", "slot", "fresh", "loads"):
        assert words in whole
    assert "low" in whole and "low" not in short
    told = {change["metric"] for change in json.loads(emoe("--json"))["single"]}
    assert told == {"slot_bytes", "perplexity_ratio_low", "swap_s", *first}
    assert "4 GB" in emoe("--metric", "slot"), "asked for by name"


def test_verdicts_that_rows_do_not_share_stay_in_the_rows(bench: Bench) -> None:
    found = compared(
        record("a", metrics={"evictions": 1.0, "tpot_s": 0.1, "others_cpu_share": 0.1}),
        record("b", metrics={"evictions": 2.0, "tpot_s": 0.2, "others_cpu_share": 0.6}),
    )
    (table,) = short_tables(view_runs(found).tables)
    assert table.title == "One value a run: no interval"
    assert {row.cells[0]: row.cells[-1] for row in table.rows}["evictions"] == ""
    assert {row.cells[0]: row.cells[-1] for row in table.rows}["tpot"] == "doubtful"
    (paired, _) = short_tables(
        view_runs(compared(record("c", frame=requests()), record("d", frame=requests(0.1)))).tables
    )
    assert "B is higher, worse" in {row.cells[-1] for row in paired.rows}


class Words(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_stands_alone_and_escapes_text(bench: Bench) -> None:
    nasty = "<script>alert(1)</script>"
    a, b = record(nasty, frame=requests()), record("b", frame=requests(0.1), params={"budget": nasty})
    page = Words(view_runs(compared(a, b)).page())
    assert not page.tags & {"script", "link", "img"}
    assert page.words.count(nasty) == 2 and "B is higher, worse" in page.words


def test_the_command_prints_tables_json_and_a_page(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emoe(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["compare", *arguments])

    monkeypatch.setenv("COLUMNS", "200")
    a, b = record("a", frame=requests()), record("b", frame=requests(0.1), params={"budget": "40%"})
    shown = emoe(a[:10], "b", "--out", str(tmp_path / "deep" / "page.html"))
    assert shown.exit_code == 0, shown.output
    assert "perplexity ratio" in shown.output and "B is higher, worse" in shown.output and "budget" in shown.output
    assert "B is higher" in (tmp_path / "deep" / "page.html").read_text()
    answer = json.loads(emoe(a, b, "--json", "--metric", "kl_nats").output)
    assert [change["metric"] for change in answer["over_prompts"]] == ["kl_nats"]
    start_parent(open_store(), "swept", {})
    mixed = emoe(a, "swept").exception
    assert isinstance(mixed, ExperimentError) and "not one of each" in str(mixed)
