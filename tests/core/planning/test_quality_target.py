"""Quality targets: what the chooser promises for any profile, and what an engine makes of its choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import OptionError
from emoe_core.planning.quality_target import choose, unscaled_loss_nats
from emoe_core.planning.tasks import Profile, ProfileError, TaskProfile
from workbench.models.reference.tiny import EXPERTS, LAYERS, TOP_K, tiny_moe
from workbench.replay.scoring import score

SHARES = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    layers = draw(st.integers(1, 4))
    tasks = {}
    for name in draw(st.sampled_from([("qa",), ("qa", "code")])):
        rows = tuple((0.0, *sorted(draw(SHARES)), 1.0) for _ in range(layers))
        losses = draw(st.lists(st.floats(0.0, 2.0), min_size=layers, max_size=layers))
        scale = draw(st.floats(0.0, 3.0))
        tasks[name] = TaskProfile(
            name, (True,) * layers, 8.0, layer_kl_nats=tuple(losses), coverage=rows, loss_scale=scale
        )
    return Profile("model", "data", layers, tasks)


TARGETS = st.floats(0.0, 1.0)


@given(profiles(), TARGETS, TARGETS)
@settings(max_examples=80)
def test_a_looser_target_never_needs_more_slots_in_any_layer(profile: Profile, one: float, other: float) -> None:
    experts = [4] * profile.n_layers
    strict, loose = (choose(profile, target, experts, 1).slots_per_layer for target in sorted((one, other)))
    assert all(more >= less for more, less in zip(strict, loose, strict=True))


@given(profiles(), TARGETS, TARGETS, st.integers(1, 4))
@settings(max_examples=80)
def test_with_given_slots_a_looser_target_never_makes_more_layers_exact(
    profile: Profile, one: float, other: float, slots: int
) -> None:
    experts = [4] * profile.n_layers
    strict, loose = (choose(profile, target, experts, 1, [slots] * len(experts)) for target in sorted((one, other)))
    assert all(loose.exact[task] <= strict.exact[task] for task in profile.tasks)
    assert loose.slots_per_layer == strict.slots_per_layer == (slots,) * len(experts)


@given(profiles(), TARGETS, st.one_of(st.none(), st.integers(1, 4)))
@settings(max_examples=80)
def test_the_predicted_loss_of_every_task_keeps_the_target(profile: Profile, target: float, slots: int | None) -> None:
    experts = [4] * profile.n_layers
    plan = choose(profile, target, experts, 2, None if slots is None else [slots] * len(experts))
    assert all(loss <= target + 1e-7 for loss in plan.predicted_loss.values())
    if slots is None:
        assert all(2 <= count <= 4 for count in plan.slots_per_layer)
        # Where no budget is given, memory is spent until nobody needs to load.
        assert target == 0 or not any(plan.exact.values())


@given(profiles(), st.integers(1, 4))
@settings(max_examples=40)
def test_a_target_of_zero_is_exact_everywhere(profile: Profile, slots: int) -> None:
    plan = choose(profile, 0.0, [4] * profile.n_layers, 1, [slots] * profile.n_layers)
    assert {
        plan.is_exact(task, layer) for task in (*profile.tasks, "unknown") for layer in range(profile.n_layers)
    } == {True}


def make_profile(model_hash: str = "model", kl: float = 0.1, **changes: object) -> Profile:
    rows = tuple(tuple(slots / EXPERTS for slots in range(EXPERTS + 1)) for _ in range(LAYERS))
    task = TaskProfile("qa", (False,) * LAYERS, 8.0, layer_kl_nats=(kl,) * LAYERS, coverage=rows, loss_scale=1.0)
    return Profile(model_hash, "data", LAYERS, {"qa": replace(task, **changes)})  # type: ignore[arg-type]


def test_the_layers_that_cost_most_stay_exact_and_unknown_tasks_do() -> None:
    profile = make_profile(layer_kl_nats=(0.01, 0.5, 0.01))
    plan = choose(profile, 0.02, [EXPERTS] * LAYERS, TOP_K, [4] * LAYERS)
    assert plan.exact == {"qa": frozenset({1})}
    assert [plan.is_exact("qa", layer) for layer in range(LAYERS)] == [False, True, False]
    assert plan.is_exact("unknown", 0) and plan.is_exact("code", 0)
    assert plan.predicted_loss["qa"] == pytest.approx(np.expm1(0.01))
    assert any("qa" in term for term, _ in plan.rows())


def test_memory_goes_to_the_layer_where_it_saves_most() -> None:
    plan = choose(make_profile(layer_kl_nats=(0.001, 0.5, 0.001)), 0.05, [EXPERTS] * LAYERS, TOP_K)
    assert plan.slots_per_layer[1] > plan.slots_per_layer[0] == plan.slots_per_layer[2] == TOP_K


@pytest.mark.parametrize("target", [-0.01, float("nan"), float("inf")])
def test_a_target_that_is_no_loss_is_refused(target: float) -> None:
    with pytest.raises(OptionError, match="max_quality_loss"):
        choose(make_profile(), target, [EXPERTS] * LAYERS, TOP_K)


@pytest.mark.parametrize("changes", [{"coverage": ()}, {"loss_scale": None}, {"layer_kl_nats": ()}])
def test_a_profile_without_what_a_target_needs_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ProfileError, match="emoe model profile MODEL --extend"):
        choose(make_profile(**changes), 0.01, [EXPERTS] * LAYERS, TOP_K)


def test_a_profile_of_another_shape_is_refused() -> None:
    with pytest.raises(ProfileError, match="emoe model profile"):
        choose(make_profile(), 0.01, [EXPERTS] * (LAYERS + 1), TOP_K)
    with pytest.raises(ProfileError, match="knows 8 experts"):
        choose(make_profile(), 0.01, [EXPERTS + 1] * LAYERS, TOP_K)


def test_the_modelled_loss_is_the_uncovered_share_of_each_layers_divergence() -> None:
    assert unscaled_loss_nats(make_profile(kl=0.2).tasks["qa"], (4, 8, 2)) == pytest.approx(0.2 * (0.5 + 0.0 + 0.75))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("target"), family="mixtral", seed=6)


PAIR = (list(range(40, 60)), list(range(60, 70)))


def test_options_that_contradict_or_lack_a_profile_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="emoe model profile"):
        emoe_core.load(checkpoint, max_quality_loss=0.01, pack_dir=tmp_path)
    with pytest.raises(OptionError, match="not both"):
        emoe_core.load(checkpoint, max_quality_loss=0.01, tolerance=0.5, profile=make_profile(), pack_dir=tmp_path)
    with pytest.raises(ProfileError, match="measured on model"):
        emoe_core.load(checkpoint, max_quality_loss=0.01, profile=make_profile(), pack_dir=tmp_path)


def test_a_target_of_zero_is_bit_identical_to_all_resident(checkpoint: Path, tmp_path: Path) -> None:
    profile = make_profile(open_checkpoint(checkpoint).source_hash)
    options = {"predictor": None, "pack_dir": tmp_path}
    with emoe_core.load(checkpoint, **options) as engine:
        expected = score(engine, [PAIR], ["qa"])[0].logits
    # The profile calls every layer insensitive; the target must not listen to that.
    with emoe_core.load(checkpoint, budget="3 slots", profile=profile, max_quality_loss=0.0, **options) as engine:
        found = score(engine, [PAIR], ["qa"])[0].logits
        counters = engine.stats().counters
    assert torch.equal(found, expected)
    assert counters.reroutes == 0 < counters.loads


def test_without_a_budget_slots_follow_the_target_and_only_profiled_tasks_reroute(
    checkpoint: Path, tmp_path: Path
) -> None:
    profile = make_profile(open_checkpoint(checkpoint).source_hash, kl=0.02)
    options = {"predictor": None, "pack_dir": tmp_path, "profile": profile, "max_quality_loss": 0.03}
    with emoe_core.load(checkpoint, **options) as engine:
        assert engine.quality is not None
        assert engine.plan.slots_per_layer == engine.quality.slots_per_layer == engine.loader.table.capacity
        assert sum(engine.plan.slots_per_layer) < LAYERS * EXPERTS
        score(engine, [PAIR], ["qa"])
        before = engine.stats().counters
        assert before.reroutes > 0
        score(engine, [PAIR], ["unknown"])
        counters = engine.stats().counters.since(before)
    assert counters.reroutes == 0 < counters.loads
