"""The processes of a bench: their order, what is kept of them, and the table that they come to."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forced_bench import FORCED, prepared_for
from rich.console import Console

from emoe_core.errors import OptionError
from workbench.bench import runner
from workbench.bench.bandwidth import memory_rate
from workbench.bench.figure import bench_figure
from workbench.bench.plan import BenchPlan
from workbench.bench.roofline import roofline
from workbench.bench.routing_pass import RoutingPass, routing_pass
from workbench.bench.runner import read_results, run_bench, schedule
from workbench.bench.summary import as_metrics, summarise
from workbench.commands.bench import _tables
from workbench.machine.control_groups import Controller
from workbench.measure.launch import FAILED, KILLED, MEASURED, Launched
from workbench.metrics.catalogue import metric_of
from workbench.models.reference.tiny import tiny_moe
from workbench.replay.accesses import accesses_of
from workbench.systems.systems import find_systems


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("model"), "olmoe")


@pytest.fixture(scope="module")
def routed(checkpoint: Path) -> RoutingPass:
    return routing_pass(checkpoint, FORCED)


def test_systems_take_turns_and_each_round_starts_with_another() -> None:
    steps = [
        (step.system.name, step.repeat) for step in schedule(find_systems(["emoe", "emoe-decayed", "accelerate"]), 2)
    ]
    names = ["emoe", "emoe-decayed", "accelerate"]
    assert steps == [*((name, 0) for name in names), *((name, 1) for name in (*names[1:], names[0]))]


def measured_row(system: str, repeat: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "system": system, "repeat": repeat, "outcome": MEASURED, "limited": False, "limit_bytes": None,
        "group_peak_bytes": None, "limit_hits": 0, "error": "", "load_s": 1.0, "import_s": 1.0, "cold_ttft_s": 2.0,
        "ttft_s": 1.0, "decoded_tokens": 4, "token_s": [seconds] * 4, "decode_read_bytes": 8_000_000,
        "likeliest": [1, 2, 3, 4, 5], "others_cpu_share": 0.0, "peak_bytes": 10, "anonymous_bytes": 9,
        "description": "it", "counters": {}, **more,
    }  # fmt: skip


def test_an_interrupted_bench_goes_on_and_does_not_try_the_killed_again(
    checkpoint: Path, routed: RoutingPass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("emoe", "stock-eager", "emoe-decayed")
    plan = BenchPlan(str(checkpoint), systems=names, repeats=3, tokens=4, prompt_tokens=3, warm_tokens=2)
    started: list[str] = []

    def answer(spec: dict[str, Any], files: object, **_: object) -> Launched:
        name = spec["adapter"] if spec["adapter"] != "emoe" else spec["options"]["policy"]
        started.append(name)
        if len(started) == 4:
            raise KeyboardInterrupt
        if len(started) == 3:
            return Launched(FAILED, {}, error="a reason")
        return Launched(KILLED, {}) if name == "stock" else Launched(MEASURED, {"token_s": [1.0]})

    monkeypatch.setattr(runner, "measure_decoding", answer)
    given = prepared_for(checkpoint, routed)
    with pytest.raises(KeyboardInterrupt):
        run_bench(plan, given, tmp_path, None, lambda *_: None)
    (tmp_path / "results.jsonl").open("a").write('{"system": "em')
    results = run_bench(plan, given, tmp_path, None, lambda *_: None)
    assert started.count("stock") == 1
    outcomes = {(row["system"], row["repeat"]): row["outcome"] for row in results}
    assert outcomes[("stock-eager", 0)] == KILLED and len(outcomes) == 7
    assert all(outcomes[(name, repeat)] == MEASURED for name in ("emoe", "emoe-decayed") for repeat in range(3))
    before = len(started)
    assert run_bench(plan, given, tmp_path, None, lambda *_: None) == results == read_results(tmp_path)
    assert len(started) == before


def test_the_table_has_medians_spread_ratios_and_bounds(checkpoint: Path, routed: RoutingPass) -> None:
    names = ("emoe", "stock-eager", "emoe-resident")
    plan = BenchPlan(str(checkpoint), systems=names, repeats=3, tokens=4, prompt_tokens=3, warm_tokens=2)
    counters = {"lookups": 24, "hits": 18, "stall_s": 0.4, "wasted_bytes": 7}
    results = [measured_row("emoe", repeat, s, counters=counters) for repeat, s in enumerate((0.1, 0.2, 0.4))]
    results += [measured_row("emoe-resident", 0, 0.05, decode_read_bytes=0, likeliest=[1, 2, 3, 4, 6])]
    results += [{**measured_row("stock-eager", 0, 1.0), "outcome": KILLED}]
    given = prepared_for(checkpoint, routed)
    table, notes = summarise(plan, given, results, "emoe")
    logged = as_metrics(table, notes)
    assert logged["emoe/tokens_per_s"] == pytest.approx(5) and all(metric_of(name).meaning for name in logged)
    rows = table.set_index("system")
    emoe = rows.loc["emoe"]
    assert (emoe["tokens_per_s"], emoe["tokens_per_s_low"], emoe["tokens_per_s_high"]) == pytest.approx((5, 2.5, 10))
    assert emoe["hit_rate"] == 0.75 and emoe["stall_share"] == pytest.approx(0.5)
    assert emoe["read_bytes_per_token"] == 2_000_000
    over_policy = emoe["reads_over_belady"] / emoe["reads_over_replay"]
    assert over_policy == pytest.approx(emoe["replay_bytes_per_token"] / roofline(given, 4).belady_bytes_per_token)
    assert over_policy >= 1 and np.isnan(rows.loc["emoe-resident", "reads_over_replay"])
    # The compute time of the resident engine, 50 ms, is longer than 2 ms of reading.
    assert emoe["bound_tokens_per_s"] == pytest.approx(20) and emoe["share_of_bound"] == pytest.approx(0.25)
    assert rows.loc["emoe-resident", "speed_ratio"] == pytest.approx(4)
    assert rows.loc["stock-eager", "outcome"] == KILLED and np.isnan(rows.loc["stock-eager", "tokens_per_s"])
    assert rows.loc["emoe-resident", "agreement"] == pytest.approx(0.8)
    assert any("a trial" in warning for warning in notes["warnings"])
    bench_figure(table, notes, "a test").savefig(Path("/dev/null"), format="png")
    with pytest.raises(OptionError, match="not among the systems"):
        summarise(plan, given, results, "accelerate")


def test_tables_name_a_system_with_its_options(checkpoint: Path, routed: RoutingPass) -> None:
    name = "emoe[threads=1]"
    plan = BenchPlan(str(checkpoint), systems=(name,), repeats=1, tokens=4, prompt_tokens=3, warm_tokens=2)
    table, _ = summarise(plan, prepared_for(checkpoint, routed), [measured_row(name, 0, 0.1)], None)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(*_tables(table, plan))
    assert console.export_text().count(name) == 2


def test_reads_bound_a_system_that_computes_faster_than_it_reads(checkpoint: Path, routed: RoutingPass) -> None:
    bounds = roofline(prepared_for(checkpoint, routed), 4)
    assert bounds.bound_tokens_per_s(5e8, 0.001) == pytest.approx(2)
    assert bounds.bound_tokens_per_s(0, None) == pytest.approx(1 / bounds.memory_s)
    assert bounds.belady_bytes_per_token <= bounds.routed_bytes_per_token < bounds.weights_bytes_per_token
    assert accesses_of(routed.trace, [3, 3]).lookups == routed.accesses.lookups
    assert memory_rate(1, 2**20, 1) > 0


@pytest.mark.long
def test_a_whole_bench_runs_under_the_limit_and_shows_one_table(
    checkpoint: Path, controller: Controller, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "workbench.cli", "bench", str(checkpoint), "--out", str(tmp_path / "b"),
        "--limit", "900MB", "--system", "emoe", "--system", "stock-eager:no-limit", "--repeats", "1", "--tokens", "4",
        "--prompt-tokens", "3", "--warm-tokens", "2", "--threads", "1", "--no-track",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    assert "stock-eager:no-limit" in run.stdout and "Warning: a trial" in run.stdout
    rows = read_results(tmp_path / "b")
    assert [row["system"] for row in rows] == ["emoe", "stock-eager:no-limit"]
    assert {row["outcome"] for row in rows} == {MEASURED}
    assert 0 < rows[0]["limit_bytes"] <= 900_000_000 and rows[1]["limit_bytes"] is None
    assert rows[0]["likeliest"] == rows[1]["likeliest"]
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["notes"]["limit_by"] == controller.description
    assert (tmp_path / "b" / "speed.png").stat().st_size > 0
