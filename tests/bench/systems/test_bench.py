"""The speed bench: what is compared, in which order, what is kept, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console

from emoe_core.budget import plan_slots
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import BudgetError, LimitError, OptionError
from workbench.bench import prepare as preparation
from workbench.bench import runner
from workbench.bench.bandwidth import Bandwidths, memory_rate
from workbench.bench.figure import bench_figure
from workbench.bench.forced_tokens import ForcedTokens, forced_tokens
from workbench.bench.limit_budget import limit_budget
from workbench.bench.plan import BenchPlan, open_folder
from workbench.bench.prepare import Prepared
from workbench.bench.replay import replayed_loads
from workbench.bench.roofline import roofline
from workbench.bench.routing_pass import RoutingPass, routing_pass
from workbench.bench.runner import read_results, run_bench, schedule
from workbench.bench.summary import as_metrics, summarise
from workbench.commands.bench import _systems, show_systems
from workbench.machine import control_groups
from workbench.machine.control_groups import Controller, find_controller
from workbench.measure.decode_job import decode_until, measure
from workbench.measure.decoding import measure_decoding
from workbench.measure.launch import FAILED, KILLED, MEASURED, Launched
from workbench.metrics.catalogue import metric_of
from workbench.models.reference.tiny import tiny_moe
from workbench.models.synthetic.shapes import SHAPES, overridden
from workbench.models.synthetic.writer import write_synthetic
from workbench.replay.accesses import accesses_of
from workbench.systems import llama_cpp
from workbench.systems.systems import DEFAULT_SYSTEMS, SYSTEMS, find_system, find_systems, require_runnable

MIB = 2**20
FORCED = ForcedTokens((1, 2, 3), (4, 5), (6, 7, 8), (9, 10, 11, 12), "a test")


@pytest.fixture
def controller() -> Controller:
    try:
        return find_controller()
    except LimitError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("model"), "olmoe")


@pytest.fixture(scope="module")
def routed(checkpoint: Path) -> RoutingPass:
    return routing_pass(checkpoint, FORCED)


def spec_of(checkpoint: Path, adapter: str = "emoe", **options: Any) -> dict[str, Any]:
    plan = BenchPlan(str(checkpoint), systems=("emoe",), tokens=4, prompt_tokens=3, warm_tokens=2)
    return preparation.common_spec(plan, str(checkpoint), FORCED) | {
        "adapter": adapter,
        "options": options,
        "scratch": str(checkpoint.parent),
    }


def test_every_system_is_described_and_every_default_is_known() -> None:
    assert all(system.what for system in SYSTEMS.values())
    assert [system.name for system in find_systems(DEFAULT_SYSTEMS)] == list(DEFAULT_SYSTEMS)


def test_suffixes_change_limit_and_options() -> None:
    system = find_system("emoe[policy=lru;threads=4]:no-limit")
    assert not system.limited and system.options == {"predictor": None, "policy": "lru", "threads": 4}
    assert find_system("emoe").limited and find_system("emoe").budgeted
    assert not find_system("emoe-resident").budgeted


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vllm"], "unknown system 'vllm': choose of emoe"),
        (["emoe[policy"], "unknown system"),
        (["emoe[policy]"], "key=value"),
        (["emoe", "emoe"], "named twice"),
        ([" "], "no system was named"),
    ],
)
def test_bad_system_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find_systems(names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 0}, "repeats is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"limit": "40%"}, 'write "900MB"'),
    ],
)
def test_bad_plans_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BenchPlan("model", **{"systems": ("emoe",), **settings})


def test_a_folder_takes_more_repeats_and_no_other_settings(tmp_path: Path) -> None:
    open_folder(tmp_path / "b", BenchPlan("m", limit="2GB", systems=("emoe",)))
    open_folder(tmp_path / "b", BenchPlan("m", limit="2GB", systems=("emoe", "lru"), repeats=9))
    with pytest.raises(OptionError, match=r"other settings \(limit, tokens\)"):
        open_folder(tmp_path / "b", BenchPlan("m", limit="1GB", systems=("emoe",), tokens=4))


def test_llama_cpp_without_its_package_is_refused_with_the_extra_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    with pytest.raises(OptionError, match=r"the extra 'llama'.*pip install"):
        require_runnable(find_systems(["emoe", "llama.cpp:no-limit"]))
    require_runnable(find_systems(["emoe"]))


def test_every_system_is_listed_with_whether_it_runs_here_and_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_limit() -> Controller:
        raise LimitError("there is no memory controller [of any version]")

    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(control_groups, "find_controller", no_limit)
    with pytest.raises(typer.Exit):
        show_systems(True)
    told = capsys.readouterr().out
    lines = {words[0]: words[-1] for words in map(str.split, told.splitlines()) if words and words[0] in SYSTEMS}
    assert set(lines) == set(SYSTEMS) and all(system.what in told for system in SYSTEMS.values())
    assert "llama.cpp cannot run here: it needs the extra 'llama': CMAKE_ARGS" in told and "-e '.[llama]'" in told
    assert "No memory limit can be set (--limit): there is no memory controller [of any version]" in told

    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(control_groups, "find_controller", lambda: Controller(2, Path("/sys/fs/cgroup")))
    with pytest.raises(typer.Exit):
        show_systems(True)
    told = capsys.readouterr().out
    lines = {words[0]: words[-1] for words in map(str.split, told.splitlines()) if words and words[0] in SYSTEMS}
    assert lines == dict.fromkeys(SYSTEMS, "yes")
    assert "cannot" not in told and "A memory limit can be set (--limit): cgroup v2, memory.max" in told


def test_the_notice_of_what_is_left_out_names_the_extra_as_it_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.systems.llama_cpp.is_installed", lambda: False)
    said = Console(file=io.StringIO(), width=300)
    assert not any(name.startswith("llama.cpp") for name in _systems(None, said))
    assert "'.[llama]'" in said.file.getvalue()


def test_systems_take_turns_and_each_round_starts_with_another() -> None:
    steps = [(step.system.name, step.repeat) for step in schedule(find_systems(["emoe", "lru", "accelerate"]), 2)]
    assert steps == [("emoe", 0), ("lru", 0), ("accelerate", 0), ("lru", 1), ("accelerate", 1), ("emoe", 1)]


def test_tokens_are_consecutive_rows_of_the_recording_and_start_with_an_answer(tmp_path: Path) -> None:
    from made_traces import trace_of

    shape = overridden(SHAPES["bench"], layers=2, experts=8, top_k=2, hidden=64, intermediate=32, vocab=320)
    path = write_synthetic(tmp_path / "m", shape, "x", trace=trace_of(300, 2, 8, 2), trace_source="a test")
    found = forced_tokens(path, 320, prompt_tokens=5, warm_tokens=3, tokens=20)
    ids = [*found.warm_prompt, *found.warm, *found.prompt, *found.timed]
    assert ids == list(range(ids[0], ids[0] + 33)) and found.timed[0] == 75
    assert "a test" in found.source
    with pytest.raises(OptionError, match="300 tokens, 1013 are asked for"):
        forced_tokens(path, 320, 5, 3, 1000)
    found = routing_pass(path, found)  # type: ignore[assignment]
    assert found.agreement == 1.0  # type: ignore[attr-defined]


def test_a_model_with_a_tokenizer_reads_text_and_one_without_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    found = forced_tokens(checkpoint, 259, 5, 3, 20)
    assert found.source == "the fixture's prompts" and len(found.timed) == 20
    assert found == forced_tokens(checkpoint, 259, 5, 3, 20)
    with pytest.raises(OptionError, match="no tokenizer"):
        forced_tokens(tmp_path, 259, 5, 3, 20)


def test_the_routing_pass_counts_what_the_engine_counts(checkpoint: Path, routed: RoutingPass) -> None:
    found = measure(spec_of(checkpoint, budget="3 slots", predictor=None))
    assert found["counters"]["requests"] == routed.routed_experts()
    assert found["counters"]["loads"] >= routed.belady_misses((3, 3, 3))
    assert routed.belady_misses((8, 8, 8)) <= routed.belady_misses((2, 2, 2)) <= routed.routed_experts()


@pytest.mark.parametrize("system", ["emoe", "lru", "emoe[budget=3 slots;policy=lfu]"])
def test_replayed_loads_are_those_of_the_engine(system: str, checkpoint: Path, routed: RoutingPass) -> None:
    given, chosen = prepared_for(checkpoint, routed), find_system(system)
    plan = BenchPlan(str(checkpoint), systems=(system,), tokens=4, prompt_tokens=3, warm_tokens=2)
    found = measure(given.spec(plan, chosen))
    replayed = replayed_loads(given, chosen)
    assert replayed is not None and 0 < replayed.sum() == found["counters"]["loads"]


@pytest.mark.parametrize(
    "system", ["emoe-lossy-1.0", "emoe-lookahead", "activation-map", "emoe-resident", "accelerate"]
)
def test_systems_whose_loads_do_not_follow_from_the_routing_are_not_replayed(
    system: str, checkpoint: Path, routed: RoutingPass
) -> None:
    assert replayed_loads(prepared_for(checkpoint, routed), find_system(system)) is None


def test_the_resident_engine_loads_no_expert_after_loading(checkpoint: Path) -> None:
    found = measure(spec_of(checkpoint, budget="100%", predictor=None))
    assert found["counters"]["bytes_loaded"] == 0 and found["counters"]["hits"] == found["counters"]["requests"] > 0


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_emoe_stock_and_accelerate_decode_the_same_likeliest_tokens(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family)
    found = {
        "emoe": measure(spec_of(path, budget="50%", predictor=None)),
        "stock": measure(spec_of(path, "stock", experts_implementation="eager")),
        "grouped": measure(spec_of(path, "stock", experts_implementation="grouped_mm")),
        "accelerate": measure(spec_of(path, "accelerate", cpu_bytes=300_000)),
    }
    assert len({tuple(row["likeliest"]) for row in found.values()}) == 1
    assert all(row["decoded_tokens"] == 4 and len(row["token_s"]) == 4 for row in found.values())
    assert "0 of" not in found["accelerate"]["description"], found["accelerate"]["description"]
    assert list(tmp_path.glob("offload-*")) == []


def test_decoding_stops_when_its_time_is_over() -> None:
    class Slow:
        def decode(self, token: int) -> int:
            return token

    assert decode_until(Slow(), [1, 2, 3], -1.0) == ([1], pytest.approx([0], abs=1))  # type: ignore[arg-type]


def test_a_process_that_the_limit_ends_is_a_result(controller: Controller, checkpoint: Path) -> None:
    run = measure_decoding(spec_of(checkpoint, budget="50%"), limit_bytes=64 * MIB, controller=controller)
    assert (run.outcome, run.found) == (KILLED, {}) and run.limit_bytes == 64 * MIB and run.limit_hits > 0


def test_a_process_that_refuses_says_why(checkpoint: Path) -> None:
    run = measure_decoding(spec_of(checkpoint, budget="1KB"))
    assert run.outcome == FAILED and "bytes short" in run.error and run.limit_bytes is None


def test_the_budget_is_what_the_limit_leaves(checkpoint: Path) -> None:
    index = open_checkpoint(checkpoint)
    found = limit_budget(index, 401_000_000, 380_000_000, 32)
    terms = found.control_bytes + found.dense_bytes + found.kv_bytes + found.workspace_bytes + found.expert_bytes
    assert found.expert_bytes == index.expert_bytes_total or terms + found.reserve_bytes == found.limit_bytes
    assert limit_budget(index, 900_000_000, 380_000_000, 32).expert_bytes == index.expert_bytes_total
    with pytest.raises(BudgetError, match=r"leaves 0 for experts.*at least 0\.\d+GB"):
        limit_budget(index, 390_000_000, 380_000_000, 32)


def test_a_limit_that_no_process_could_keep_is_refused_before_anything_is_prepared(
    checkpoint: Path, tmp_path: Path
) -> None:
    plan = BenchPlan(str(checkpoint), limit="300KB", systems=("emoe",))
    with pytest.raises(BudgetError, match=r"dense weights take .* one slot a layer .* Give more than 0\.01GB"):
        preparation.prepare(plan, tmp_path, None, lambda *stage: pytest.fail(f"began: {stage}"))
    assert not list(tmp_path.iterdir())


def test_the_smallest_limit_that_the_message_names_works(checkpoint: Path) -> None:
    index = open_checkpoint(checkpoint)
    with pytest.raises(BudgetError) as refused:
        limit_budget(index, 390_000_000, 380_000_000, 32)
    named = float(str(refused.value).split("at least ")[1].split("GB")[0])
    assert limit_budget(index, int(named * 1e9), 380_000_000, 32).expert_bytes >= plan_slots(index, "1 slot").slot_bytes


def prepared_for(checkpoint: Path, routed: RoutingPass) -> Prepared:
    index = open_checkpoint(checkpoint)
    facts = {
        "record_bytes": max(layer.record_bytes for layer in index.layers),
        "token_dense_bytes": 1000,
        "tokens_from": "a test",
        "routing_agreement": None,
        "limit_by": None,
        "budget_terms": None,
        "expert_budget": "50%",
        "accelerate_bytes": 1,
    }
    rates = Bandwidths(1e9, True, 4096, 1e10)
    trace = routed.path
    return Prepared(index, plan_slots(index, "50%"), FORCED, routed, rates, trace, None, (), facts)


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
    names = ("emoe", "stock-eager", "lru")
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
    assert all(outcomes[(name, repeat)] == MEASURED for name in ("emoe", "lru") for repeat in range(3))
    before = len(started)
    assert run_bench(plan, given, tmp_path, None, lambda *_: None) == results == read_results(tmp_path)
    assert len(started) == before


def test_the_table_has_medians_spread_ratios_and_bounds(checkpoint: Path, routed: RoutingPass) -> None:
    names = ("emoe", "stock-eager", "emoe-resident")
    plan = BenchPlan(str(checkpoint), systems=names, repeats=3, tokens=4, prompt_tokens=3, warm_tokens=2)
    counters = {"requests": 24, "hits": 18, "stall_s": 0.4, "wasted_bytes": 7}
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


def test_reads_bound_a_system_that_computes_faster_than_it_reads(checkpoint: Path, routed: RoutingPass) -> None:
    bounds = roofline(prepared_for(checkpoint, routed), 4)
    assert bounds.bound_tokens_per_s(5e8, 0.001) == pytest.approx(2)
    assert bounds.bound_tokens_per_s(0, None) == pytest.approx(1 / bounds.memory_s)
    assert bounds.belady_bytes_per_token <= bounds.routed_bytes_per_token < bounds.weights_bytes_per_token
    assert accesses_of(routed.trace, [3, 3]).requests == routed.accesses.requests
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
