"""What a bench needs before it runs: settings, tokens, their routing, and what a limit leaves for experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forced_bench import FORCED, prepared_for, spec_of

from emoe_core.budget import plan_slots
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import BudgetError, OptionError
from workbench.bench import prepare as preparation
from workbench.bench.forced_tokens import forced_tokens
from workbench.bench.limit_budget import limit_budget
from workbench.bench.plan import BenchPlan, open_folder
from workbench.bench.replay import replayed_loads
from workbench.bench.routing_pass import RoutingPass, routing_pass
from workbench.measure.decode_job import measure
from workbench.models.reference.tiny import tiny_moe
from workbench.models.synthetic.shapes import SHAPES, overridden
from workbench.models.synthetic.writer import write_synthetic
from workbench.systems.systems import find_system


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("model"), "olmoe")


@pytest.fixture(scope="module")
def routed(checkpoint: Path) -> RoutingPass:
    return routing_pass(checkpoint, FORCED)


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
    open_folder(tmp_path / "b", BenchPlan("m", limit="2GB", systems=("emoe", "emoe-decayed"), repeats=9))
    with pytest.raises(OptionError, match=r"other settings \(limit, tokens\)"):
        open_folder(tmp_path / "b", BenchPlan("m", limit="1GB", systems=("emoe",), tokens=4))


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
    assert found["counters"]["lookups"] == routed.routed_experts()
    assert found["counters"]["loads"] >= routed.belady_misses((3, 3, 3))
    assert routed.belady_misses((8, 8, 8)) <= routed.belady_misses((2, 2, 2)) <= routed.routed_experts()


@pytest.mark.parametrize("system", ["emoe", "emoe-decayed", "emoe[budget=3 slots;policy=lfu]"])
def test_replayed_loads_are_those_of_the_engine(system: str, checkpoint: Path, routed: RoutingPass) -> None:
    given, chosen = prepared_for(checkpoint, routed), find_system(system)
    plan = BenchPlan(str(checkpoint), systems=(system,), tokens=4, prompt_tokens=3, warm_tokens=2)
    found = measure(given.spec(plan, chosen))
    replayed = replayed_loads(given, chosen)
    assert replayed is not None and 0 < replayed.sum() == found["counters"]["loads"]


@pytest.mark.parametrize("system", ["emoe-lossy-1.0", "activation-map", "emoe-resident", "accelerate"])
def test_systems_whose_loads_do_not_follow_from_the_routing_are_not_replayed(
    system: str, checkpoint: Path, routed: RoutingPass
) -> None:
    assert replayed_loads(prepared_for(checkpoint, routed), find_system(system)) is None


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
