"""Integration: what the miss tolerance promises, checked on real forward passes and their recorded routing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import OptionError
from emoe_core.experts.trace import DROP, LOAD
from emoe_core.planning.tasks import Profile, TaskProfile
from workbench.models.reference.tiny import FAMILIES, LAYERS, tiny_moe
from workbench.replay.scoring import score

FLOAT16_EPSILON = 2e-3


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("lossy"), family="mixtral", seed=6)


def ids(tokens: int = 24, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def logits_of(engine: emoe_core.Engine, inputs: torch.Tensor, **extra: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return engine.model(input_ids=inputs, use_cache=False, **extra).logits


def run(path: Path, pack_dir: Path, tolerance: float, budget: str = "3 slots", **options):
    with emoe_core.load(
        path, budget=budget, tolerance=tolerance, predictor=None, record=True, pack_dir=pack_dir, **options
    ) as engine:
        logits = [logits_of(engine, ids(seed=seed)) for seed in range(4)]
        return logits, engine.stats().counters, engine.trace()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tolerance_with_every_expert_resident_is_exact(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=6)
    exact, _, _ = run(path, tmp_path, 0.0, "100%")
    lossy, counters, _ = run(path, tmp_path, 1.0, "100%")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(lossy, exact, strict=True))
    assert counters.reroutes == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tolerance_loads_nothing_once_its_slots_are_full(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=6)
    with emoe_core.load(path, budget="3 slots", tolerance=1.0, predictor=None, pack_dir=tmp_path) as engine:
        logits_of(engine, ids())
        filled = engine.stats()
        assert filled.counters.loads == filled.resident_experts == 3 * len(engine.index.layers)
        for seed in range(1, 4):
            assert logits_of(engine, ids(seed=seed)).isfinite().all()
        counters = engine.stats().counters.since(filled.counters)
    assert counters.loads == counters.evictions == counters.bytes_loaded == 0
    assert counters.reroutes > 0


def test_loads_fall_and_reroutes_rise_with_tolerance(mixtral: Path, tmp_path: Path) -> None:
    seen = [run(mixtral, tmp_path, tolerance)[1] for tolerance in (0.0, 0.3, 0.5, 1.0)]
    loads = [counters.loads for counters in seen]
    reroutes = [counters.token_reroutes for counters in seen]
    assert loads == sorted(loads, reverse=True) and loads[0] > loads[1] > loads[-1]
    assert reroutes == sorted(reroutes) and reroutes[0] == 0 < reroutes[1] < reroutes[-1]


@pytest.mark.parametrize("tolerance", [0.3, 0.45, 0.7])
def test_no_token_loses_more_than_the_tolerance(mixtral: Path, tmp_path: Path, tolerance: float) -> None:
    _, counters, trace = run(mixtral, tmp_path, tolerance)
    weight = trace.weight.astype(np.float64)
    replaced = trace.chosen != trace.served
    lost = (weight * replaced).sum(axis=-1) / weight.sum(axis=-1)
    assert counters.token_reroutes == replaced.sum() > 0
    assert lost.max() <= tolerance + FLOAT16_EPSILON


def test_dropping_computes_what_the_router_left_of_each_token(mixtral: Path, tmp_path: Path) -> None:
    _, counters, trace = run(mixtral, tmp_path, 1.0, on_miss="drop")
    dropped = trace.outcome == DROP
    assert counters.reroutes == counters.token_reroutes == 0
    assert counters.token_drops == dropped.sum() > 0
    assert counters.token_loads == (trace.outcome == LOAD).sum()
    assert np.array_equal(trace.served[~dropped], trace.chosen[~dropped])


def test_dropping_is_exact_where_all_are_resident_or_nothing_is_tolerated(mixtral: Path, tmp_path: Path) -> None:
    exact = run(mixtral, tmp_path, 0.0)[0]
    assert all(map(torch.equal, run(mixtral, tmp_path, 1.0, "100%", on_miss="drop")[0], exact))
    assert all(map(torch.equal, run(mixtral, tmp_path, 0.0, on_miss="drop")[0], exact)), "tolerance 0 is exact"
    assert not all(map(torch.equal, run(mixtral, tmp_path, 1.0, on_miss="drop")[0], exact))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_miss": "guess"}, "unknown on_miss"),
        ({"on_miss": "drop", "tolerance": 1.0, "cache_bias": 0.2}, "leave it out"),
    ],
)
def test_an_on_miss_that_makes_no_sense_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        emoe_core.load(tmp_path, **options)


def test_with_one_resident_every_token_uses_it(mixtral: Path, tmp_path: Path) -> None:
    with emoe_core.load(
        mixtral, budget="1 slot", tolerance=1.0, predictor=None, pack_dir=tmp_path, record=True
    ) as engine:
        logits = logits_of(engine, ids())
        residents = [engine.loader.table.resident(layer) for layer in range(LAYERS)]
        served = engine.trace().served
    assert logits.isfinite().all()
    assert all(len(resident) == 1 for resident in residents)
    assert [set(served[:, layer].ravel().tolist()) for layer in range(LAYERS)] == residents


def profile_of(engine_path: Path, insensitive: str, layers: tuple[bool, ...]) -> Profile:
    source = open_checkpoint(engine_path).source_hash
    return Profile(source, "none", len(layers), {insensitive: TaskProfile(insensitive, layers, 8.0)})


def prompt(seed: int, tokens: int = 24) -> tuple[list[int], list[int]]:
    row = ids(tokens, seed=seed)[0].tolist()
    return row[:4], row[4:]


def test_an_insensitive_task_is_rerouted_beside_an_exact_one(mixtral: Path, tmp_path: Path) -> None:
    profile = profile_of(mixtral, "classification", (False,) * LAYERS)
    with emoe_core.load(mixtral, budget="100%", pack_dir=tmp_path) as engine:
        exact = score(engine, [prompt(1), prompt(2)])
    with emoe_core.load(
        mixtral, budget="3 slots", predictor=None, profile=profile, pack_dir=tmp_path, record=True
    ) as engine:
        score(engine, [prompt(0)], ["qa"])
        rerouted = score(engine, [prompt(1)], ["classification"])[0]
        after_lossy = engine.stats().counters
        kept = score(engine, [prompt(2)], ["qa"])[0]
        after_exact = engine.stats().counters.since(after_lossy)
        trace = engine.trace()
    assert after_lossy.reroutes > 0
    assert after_exact.reroutes == 0 < after_exact.loads
    assert torch.equal(kept.logits, exact[1].logits)
    assert not torch.equal(rerouted.logits, exact[0].logits)
    tasks = {trace.tasks[request] for request in trace.request[(trace.chosen != trace.served).any(axis=(1, 2))]}
    assert tasks == {"classification"}


def test_only_the_insensitive_layers_are_rerouted(mixtral: Path, tmp_path: Path) -> None:
    profile = profile_of(mixtral, "classification", (False, True, True))
    with emoe_core.load(
        mixtral, budget="3 slots", predictor=None, profile=profile, pack_dir=tmp_path, record=True
    ) as engine:
        score(engine, [prompt(seed) for seed in range(3)], ["classification"] * 3)
        trace = engine.trace()
    changed = (trace.chosen != trace.served).any(axis=(0, 2)).tolist()
    assert changed == [True, False, False]


def test_tolerance_is_per_row_in_a_mixed_batch(mixtral: Path, tmp_path: Path) -> None:
    profile = profile_of(mixtral, "classification", (False,) * LAYERS)
    with emoe_core.load(
        mixtral, budget="2 slots", predictor=None, profile=profile, pack_dir=tmp_path, record=True
    ) as engine:
        requests = engine.admit(["qa", "classification"], [2, 24])
        # The exact row repeats one token, so that it does not ask for every expert.
        inputs = torch.cat([torch.full((1, 24), 7), ids()])
        logits_of(engine, inputs)
        engine.finish(requests)
        trace = engine.trace()
    changed = (trace.chosen != trace.served).any(axis=(1, 2))
    assert set(trace.request[changed].tolist()) == {requests[1].engine_number}


def test_what_is_loaded_for_one_token_serves_every_other(mixtral: Path, tmp_path: Path) -> None:
    profile = profile_of(mixtral, "classification", (False,) * LAYERS)
    with emoe_core.load(
        mixtral, budget="2 slots", predictor=None, profile=profile, pack_dir=tmp_path, record=True
    ) as engine:
        logits_of(engine, ids(seed=9))
        engine.admit(["qa", "classification"], [24, 24])
        logits_of(engine, ids(seed=3).repeat(2, 1))
        trace = engine.trace()
        counters = engine.stats().counters
    # Both rows choose alike: all experts of the exact row are loaded, so the tolerant row loses nothing.
    assert np.array_equal(trace.chosen, trace.served)
    assert counters.reroutes == 0


def test_a_cache_bias_loads_less_than_exact_and_more_than_rerouting_everything(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="mixtral", seed=5)
    ids = torch.arange(24).unsqueeze(0)
    loads = {}
    for name, options in {
        "exact": {"tolerance": 0.0},
        "biased": {"tolerance": 1.0, "cache_bias": 0.3},
        "all": {"tolerance": 1.0},
    }.items():
        with emoe_core.load(path, budget="3 slots", predictor=None, pack_dir=tmp_path, verify="always", **options) as e:
            with torch.no_grad():
                for place in range(ids.shape[1]):
                    e.model(input_ids=ids[:, place : place + 1], use_cache=False)
            e.stats().counters.check()
            loads[name] = e.stats().counters.loads
    assert loads["all"] < loads["biased"] < loads["exact"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cache_bias": -0.1, "tolerance": 1.0}, "give 0"), ({"cache_bias": 0.2}, "give a tolerance")],
)
def test_a_cache_bias_that_makes_no_sense_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        emoe_core.load(tmp_path, **options)
