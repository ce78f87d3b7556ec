"""Promises of lookahead: exact, within the budget, nothing in use evicted, and every guess accounted for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from exact_passes import FAMILIES, prefill_and_decode, prompt_ids, stock
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import POLICIES, borrow, check_all, make, pack  # noqa: F401

import emoe_core
from emoe_core.errors import OptionError
from emoe_core.loader.pack import Pack
from emoe_core.loader.prefetch import MIN_TRUST, Lookahead, norm_scale
from emoe_core.loader.slots import Policy
from workbench.models.reference.tiny import EXPERTS, LAYERS, TOP_K, tiny_moe
from workbench.quality.configuration import ExperimentConfig, as_params
from workbench.systems.eviction_rules import static


@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_lookahead_is_bit_identical_to_eager(family: str, distance: int, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=3, dtype=torch.bfloat16)
    reference = stock(path, torch.bfloat16)
    ids = prompt_ids(reference.config.vocab_size)
    expected = prefill_and_decode(reference, ids, steps=8)
    options = {"budget": "3 slots", "predictor": None, "pack_dir": tmp_path, "verify": "always"}
    with emoe_core.load(path, lookahead=distance, **options) as engine:
        for _ in range(2):
            mine = prefill_and_decode(engine.model, ids, steps=8)
            assert all(torch.equal(got, want) for got, want in zip(mine, expected, strict=True))
        engine.loader.settle()
        engine.loader.table.check()
        counters = engine.stats().counters
        guessing = max(0, len(engine.index.layers) - distance)
    assert counters.lookahead_wanted == counters.lookahead_guessed == 2 * 8 * guessing * TOP_K, "decode passes only"
    if distance == 1:
        assert counters.lookahead_loads > 0
    # Closing settles what was still open.
    counters = engine.loader.counters
    counters.check()
    assert counters.lookahead_used + counters.lookahead_wasted == counters.lookahead_loads == counters.prefetches


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_of_every_family_are_found_and_differ_by_weights_alone(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=3, dtype=torch.float32)
    with emoe_core.load(path, budget="3 slots", lookahead=1, predictor=None, pack_dir=tmp_path) as engine:
        assert engine.lookahead is not None
        assert all(scale is not None for scale in engine.lookahead.scales[:-1])
        assert engine.lookahead.scales[-1] is None


def test_a_layer_that_repeats_its_predecessor_is_guessed_perfectly(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="mixtral", seed=3, dtype=torch.float32)
    with emoe_core.load(path, budget="3 slots", lookahead=1, predictor=None, pack_dir=tmp_path) as engine:
        layers = engine.model.model.layers
        with torch.no_grad():
            for layer in layers[1:]:
                # Attention that adds nothing and experts of weight 0: the router sees the same stream again.
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.gate.weight.copy_(layers[0].mlp.gate.weight)
                layer.post_attention_layernorm.weight.copy_(layers[0].post_attention_layernorm.weight)
            for layer in layers:
                layer.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        engine.lookahead.scales = [None] * len(layers)
        prefill_and_decode(engine.model, prompt_ids(engine.model.config.vocab_size), steps=6)
        counters = engine.stats().counters
    assert counters.lookahead_recall == counters.lookahead_precision == 1.0
    assert counters.lookahead_guessed == 6 * (LAYERS - 1) * TOP_K


def test_a_set_that_does_not_fit_is_not_guessed(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="mixtral", seed=3, dtype=torch.float32)
    ids = prompt_ids(256)
    with emoe_core.load(path, budget="1 slots", lookahead=1, predictor=None, pack_dir=tmp_path) as engine:
        prefill_and_decode(engine.model, ids)
        assert engine.stats().counters.lookahead_guessed == engine.stats().counters.prefetches == 0


@settings(max_examples=60)
@given(
    st.sets(st.integers(0, EXPERTS - 1), max_size=4).map(sorted),
    st.lists(st.integers(0, EXPERTS - 1), unique=True, min_size=1, max_size=4),
    st.integers(0, 4),
    st.sampled_from(POLICIES),
)
def test_a_guess_evicts_nothing_in_use_and_nothing_guessed(
    pack: Pack,  # noqa: F811
    before: list[int],
    guess: list[int],
    pinned: int,
    policy: str | Policy,
) -> None:
    loader = make(pack, capacity=4, policy=policy)
    try:
        loader.swap([[], before, []])
        loader.settle()
        # The layer that computes asks for all its experts; another layer's demand must not matter here.
        loader.table.begin(0, [1] * EXPERTS)
        held = [entry for entry in loader.table.entries()][:pinned]
        for entry in held:
            entry.pins += 1
        loads = loader.fetch_ahead(1, guess)
        resident = loader.table.resident(1)
        assert {entry.expert for entry in held} | (set(before) & set(guess)) <= resident
        assert len(resident) <= 4 and loads == loader.counters.lookahead_loads == len(resident - set(before))
        if not held and policy is not static:  # which evicts for nobody
            assert set(guess) <= resident, "nothing is in use: the whole guess fits"
        assert all(entry.pins == 1 for entry in held)
        for entry in held:
            entry.pins -= 1
        check_all(pack, loader)
        used = sorted(set(guess[:1]) & resident)
        with loader.lease(1, used or [0]) as lease:
            for expert in used or [0]:
                lease[expert]
        check_all(pack, loader)
    finally:
        loader.close()
    counters = loader.counters
    assert counters.lookahead_used + counters.lookahead_wasted == counters.lookahead_loads
    assert counters.lookahead_used == len(set(used) - set(before))


def test_a_failed_guess_is_dropped_and_wasted(pack: Pack) -> None:  # noqa: F811
    loader = make(pack, capacity=2)
    loader.storage.broken.add((1, 5))
    assert loader.fetch_ahead(1, [5, 6]) == 2
    check_all(pack, loader)
    assert loader.table.resident(1) == {6}
    assert loader.counters.lookahead_wasted == 1
    loader.reset_counters()
    loader.close()
    assert loader.counters.lookahead_wasted == 0, "what came before the reset is nobody's waste"


def test_wrong_guesses_that_were_not_begun_are_called_off(pack: Pack) -> None:  # noqa: F811
    loader = make(pack, capacity=4, threads=1)
    busy, begun = threading.Event(), threading.Event()
    loader.storage.before_read = lambda: (begun.set(), busy.wait(timeout=60))
    assert loader.fetch_ahead(1, [2, 5, 6]) == 3
    assert begun.wait(timeout=60), "the only thread reads expert 2"
    loader.call_off(1, [2, 6])
    assert loader.table.resident(1) == {2, 5}
    busy.set()
    check_all(pack, loader)
    assert loader.counters.lookahead_loads == loader.counters.prefetches == 2
    loader.close()
    assert loader.counters.lookahead_wasted == 2


class Guess:
    """A router that always chooses the same experts."""

    def __init__(self, chosen: list[int]) -> None:
        self.chosen = torch.tensor([chosen])

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.chosen


@pytest.mark.parametrize("right", [True, False])
def test_a_guesser_is_trusted_while_it_is_right(right: bool, pack: Pack) -> None:  # noqa: F811
    loader = make(pack, capacity=2)
    lookahead = Lookahead(loader, [None, Guess([0, 1])], [None, None], 1)
    hidden, loads = torch.zeros(1, 4), []
    for step in range(300):
        loader.table.forward = step
        lookahead.guess(0, hidden, None)
        lookahead.score(1, [0, 1] if right else [2, 3])
        loads.append(loader.counters.lookahead_loads)
        # Demand that pushes the guess out of the slots again.
        borrow(pack, loader, 1, [2, 3])
    loader.settle()
    loader.table.check()
    if right:
        assert lookahead.trust > 0.99
        assert loads[-1] > loads[200] > loads[100], "it goes on fetching"
    else:
        assert lookahead.trust < MIN_TRUST
        assert loads[-1] == loads[100], "once distrusted, nothing is fetched"
        # It goes on listening, and is believed again once it is right.
        for step in range(300, 4000):
            loader.table.forward = step
            lookahead.guess(0, hidden, None)
            lookahead.score(1, [0, 1])
        assert lookahead.trust > MIN_TRUST
    loader.close()


def test_norms_of_another_kind_are_refused() -> None:
    layer_norm, rms_norm = torch.nn.LayerNorm(16), torch.nn.RMSNorm(16)
    with torch.no_grad():
        layer_norm.bias.fill_(3.0)
    assert norm_scale(layer_norm, rms_norm) is None
    assert norm_scale(None, rms_norm) is None
    zero = torch.nn.RMSNorm(16)
    with torch.no_grad():
        zero.weight.zero_()
    assert norm_scale(zero, rms_norm) is None


@pytest.mark.parametrize("value", [-1, 0.5, "next"])
def test_a_bad_lookahead_is_refused(value: object, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="mixtral", seed=3)
    with pytest.raises(OptionError, match="0 being off"):
        emoe_core.load(path, lookahead=value)


def test_an_experiment_can_vary_it() -> None:
    config = ExperimentConfig(strategy="lru", lookahead=2)
    assert config.engine_options()["lookahead"] == as_params(config)["lookahead"] == 2
    with pytest.raises(OptionError, match="0 being off"):
        ExperimentConfig(lookahead=-1)
