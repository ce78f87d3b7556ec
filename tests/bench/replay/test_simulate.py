"""Promises of the cache simulation: it counts what an engine counts, and nothing beats the bound."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import emoe_core
from emoe_core.errors import OptionError
from emoe_core.experts.trace import RoutingTrace
from emoe_core.loader.decayed_demand import DemandTable
from emoe_core.loader.eviction import POLICY_NAMES as ENGINE_POLICIES
from workbench.cli import app
from workbench.models.reference.tiny import tiny_moe
from workbench.replay.accesses import Accesses, accesses_of, accesses_of_reference
from workbench.replay.bound import fewest_misses
from workbench.replay.cache import replay_policy, replay_table, simulate
from workbench.replay.policies import POLICY_NAMES
from workbench.replay.references import reference_outputs
from workbench.systems.eviction_rules import RULES
from workbench.systems.option_names import resolve_options

PROMPTS = ["A heron waits.", "Two and two", "Why is the sky blue at noon?"]


def make_accesses(needed: np.ndarray, seed: int = 0) -> Accesses:
    tokens = needed * np.random.default_rng(seed).integers(1, 9, size=needed.shape)
    return Accesses(tokens.astype(np.int32), np.zeros(len(needed), dtype=bool), ("qa",) * len(needed))


def draw_accesses(seed: int, steps: int = 14, layers: int = 2, experts: int = 5) -> Accesses:
    generator = np.random.default_rng(seed)
    return make_accesses(generator.random((steps, layers, experts)) < generator.random((steps, 1, 1)), seed)


def one_layer(*steps: list[int]) -> np.ndarray:
    needed = np.zeros((len(steps), 1, 4), dtype=bool)
    for place, experts in enumerate(steps):
        needed[place, 0, experts] = True
    return needed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("simulated") / "model", "mixtral", seed=5)


@pytest.mark.parametrize("policy", sorted((*ENGINE_POLICIES, *RULES)))
@pytest.mark.parametrize(("budget", "batch_size"), [("1 slot", 1), ("3 slots", 1), ("5 slots", 2), ("8 slots", 1)])
def test_the_replay_counts_what_the_engine_counts(model: Path, policy: str, budget: str, batch_size: int) -> None:
    packs = model.parent / "packs"
    options = {"predictor": None, "policy": policy, "record": True, "pack_dir": packs}
    with emoe_core.load(model, budget=budget, **resolve_options(options)) as engine:
        engine.generate(PROMPTS, max_new_tokens=12, batch_size=batch_size)
        counters, accesses = engine.stats().counters, accesses_of(engine.trace(), batch_size=batch_size)
        capacity = engine.plan.slots_per_layer
    replayed = replay_policy(accesses, policy, capacity)
    assert accesses.lookups == counters.lookups and len(accesses) == counters.forwards
    assert replayed.loads == counters.loads
    assert counters.loads < counters.lookups, "a cache that never hits would prove little"


@given(seed=st.integers(0, 10**6), slots=st.lists(st.integers(1, 5), min_size=2, max_size=2))
@settings(max_examples=60)
def test_nothing_loads_less_than_the_bound_in_any_layer(seed: int, slots: list[int]) -> None:
    accesses = draw_accesses(seed)
    bound = replay_policy(accesses, "min", slots)
    for policy in POLICY_NAMES:
        replayed = replay_policy(accesses, policy, slots, warm=draw_accesses(seed + 1), seed=seed)
        preloads = np.array(slots) if replayed.preloads else 0
        assert (bound.misses.sum(axis=0) <= replayed.misses.sum(axis=0) + preloads).all(), policy


@given(seed=st.integers(0, 10**6), slots=st.integers(1, 4))
@settings(max_examples=60)
def test_the_bound_is_reached_by_some_choice_of_residents(seed: int, slots: int) -> None:
    needed = draw_accesses(seed, steps=5, layers=1, experts=4).needed
    # Exhaustive: after each step, any set of at most ``slots`` of those resident or needed.
    best = {0: 0}
    for step in needed[:, 0]:
        wanted = sum(1 << int(expert) for expert in np.flatnonzero(step))
        after: dict[int, int] = {}
        for resident, misses in best.items():
            cost = misses + (wanted & ~resident).bit_count()
            for kept in range(16):
                if kept.bit_count() <= slots and not kept & ~(resident | wanted):
                    after[kept] = min(after.get(kept, 99), cost)
        best = after
    assert fewest_misses(needed, [slots]).sum() == min(best.values())


@pytest.mark.parametrize("policy", [name for name in POLICY_NAMES if name != "pinned"])
def test_with_all_slots_only_the_first_use_misses(policy: str) -> None:
    accesses = draw_accesses(3)
    assert replay_policy(accesses, policy, [5, 5]).loads == accesses.compulsory


def test_misses_worked_out_by_hand() -> None:
    accesses = make_accesses(one_layer([0], [1], [2], [0], [1], [0]))
    assert replay_policy(accesses, "lru", [2]).misses[:, 0].tolist() == [1, 1, 1, 1, 1, 0]
    assert replay_policy(accesses, "min", [2]).misses[:, 0].tolist() == [1, 1, 1, 0, 0, 0]


def test_pinned_holds_what_most_tokens_of_the_warm_up_chose() -> None:
    tokens = np.zeros((1, 1, 4), dtype=np.int32)
    tokens[0, 0] = [1, 5, 0, 2]
    warm = Accesses(tokens, np.zeros(1, dtype=bool), ("qa",))
    accesses = make_accesses(one_layer([0], [1], [3], [1]))
    pinned = replay_policy(accesses, "pinned", [2], warm=warm)
    assert (pinned.preloads, pinned.misses[:, 0].tolist()) == (2, [1, 0, 0, 0])


def test_decayed_demand_keeps_what_a_long_pass_chose_most() -> None:
    needed = one_layer([0, 1, 2, 3], [1], [2], [1], [2])
    tokens = needed.astype(np.int32)
    tokens[0, 0] = [1, 40, 40, 1]
    accesses = Accesses(tokens, np.array([True, False, False, False, False]), ("qa",) * 5)
    assert replay_policy(accesses, "decayed_demand", [2]).misses[1:].sum() == 0
    assert replay_policy(accesses, "lru", [2]).misses[1:].sum() == 2, "LRU holds 2 and 3, the last of the pass"


@given(seed=st.integers(0, 10**6), slots=st.integers(1, 5))
@settings(max_examples=40)
def test_decayed_demand_leaves_its_table_in_order(seed: int, slots: int) -> None:
    table = DemandTable([slots, slots], 1, 5)
    replay_table(draw_accesses(seed), "decayed_demand", table)
    table.check()
    assert all(len(table.resident(layer)) <= slots for layer in range(2))
    assert not any(entry.pins for entry in table.entries())


def test_the_table_of_results_has_its_bounds_and_its_gap() -> None:
    streams = {"one": draw_accesses(1, steps=60), "two": draw_accesses(2, steps=60)}
    steps: list[tuple[int, int]] = []
    found = simulate(streams, {"half": [3, 3]}, ["lfu"], expert_bytes=10, progress=lambda *step: steps.append(step))
    assert steps[-1] == (6, 6) and len(found) == 6
    by_policy = found.groupby("policy")["gap_closed"].agg(["min", "max"])
    assert by_policy.loc["lru"].tolist() == [0, 0] and by_policy.loc["min"].tolist() == [1, 1]
    assert (found["loaded_bytes"] == 10 * found["loads"]).all()
    assert (found["prefill_misses"] + found["decode_misses"] == found["misses"]).all()


def test_a_reference_is_cut_into_a_prompt_and_one_pass_a_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    reference = reference_outputs(model, PROMPTS[:2], ["qa", "code"], max_new_tokens=5)
    accesses = accesses_of_reference(reference)
    passes = [len(output.token_ids) for output in reference.outputs]
    assert len(accesses) == sum(passes) and accesses.prefill.sum() == 2
    assert accesses.tasks == ("qa",) * passes[0] + ("code",) * passes[1]
    per_step = accesses.tokens.sum(axis=2)
    lengths = [len(output.prompt_ids) for output in reference.outputs]
    assert (per_step[accesses.prefill] == 2 * np.array(lengths)[:, None]).all(), "two choices a token"
    assert (per_step[~accesses.prefill] == 2).all()
    # What an engine records when it really decodes is the same, wherever it chose the same tokens.
    with emoe_core.load(model, budget="100%", predictor=None, record=True, pack_dir=tmp_path) as engine:
        answers = engine.generate(PROMPTS[:2], ["qa", "code"], max_new_tokens=5)
        decoded = accesses_of(engine.trace())
    assert [answer.token_ids for answer in answers] == [output.token_ids for output in reference.outputs]
    np.testing.assert_array_equal(decoded.tokens, accesses.tokens)


def test_a_batch_needs_the_union_of_its_requests() -> None:
    chosen = np.array([[[0]], [[1]], [[2]], [[3]]], dtype=np.uint16)
    trace = RoutingTrace(
        request=np.array([0, 0, 1, 1], dtype=np.int32),
        position=np.array([0, 1, 0, 1], dtype=np.int32),
        prefill=np.array([True, False, True, False]),
        chosen=chosen,
        served=chosen,
        weight=np.ones(chosen.shape, dtype=np.float16),
        tasks={0: "qa", 1: "code"},
        experts=4,
    )
    both = accesses_of(trace, batch_size=2)
    assert [np.flatnonzero(row[0]).tolist() for row in both.tokens] == [[0, 2], [1, 3]]
    assert both.tasks == ("mixed", "mixed")
    assert accesses_of(trace).tasks == ("qa", "qa", "code", "code")


def test_wrong_requests_are_refused_with_the_fix() -> None:
    accesses = draw_accesses(0)
    with pytest.raises(OptionError, match="choose one of lru"):
        replay_policy(accesses, "clock", [1, 1])
    for capacity in ([0, 1], [6, 1], [1]):
        with pytest.raises(OptionError, match="give 1 to 5 for each of 2"):
            replay_policy(accesses, "lru", capacity)
    with pytest.raises(OptionError, match="warm_prompts"):
        replay_policy(accesses, "pinned", [1, 1])


def test_the_command_prints_every_policy_as_json_and_refuses_an_unknown_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))

    def emoe(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["simulate", "cache", str(model), *arguments])

    refused = emoe("--policy", "clock")
    assert isinstance(refused.exception, OptionError) and "choose one of lru" in str(refused.exception)
    small = ("--prompts", "2", "--warm-prompts", "2", "--max-new-tokens", "3", "--source", "fixture", "--mix", "sticky")
    found = emoe(*small, "--budget", "3 slots", "--policy", "lfu", "--policy", "pinned", "--json")
    assert found.exit_code == 0, found.exception
    rows = {row["policy"]: row for row in json.loads(found.stdout)}
    assert sorted(rows) == ["lfu", "lru", "min", "pinned"]
    assert rows["min"]["gap_closed"] == 1.0 and rows["lru"]["slots"] == 3.0
    assert rows["pinned"]["loads"] == rows["pinned"]["misses"] + 9, "three slots in each of three layers"
