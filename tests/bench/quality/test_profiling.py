"""Integration: a whole task profile of a tiny model, measured by the engine on the fixture's prompts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import tiny_encoder

from emoe_core.errors import DataError
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.planning.quality_target import choose
from emoe_core.planning.tasks import TASK_TYPES, Profile, ProfileError
from workbench.models.reference.tiny import EXPERTS, LAYERS, TOP_K, tiny_moe
from workbench.quality import similarity as similarity_module
from workbench.quality.profile import disturbance
from workbench.quality.profile.coverage import coverage
from workbench.quality.profile.masks import mask_by_similarity
from workbench.quality.profile.profiling import (
    ProfileConfig,
    extend_profile,
    measure_profile,
    profile_path,
    stored_profile,
)
from workbench.replay.references import reference_outputs


@pytest.fixture(scope="module")
def patch(tmp_path_factory: pytest.TempPathFactory) -> pytest.MonkeyPatch:
    with pytest.MonkeyPatch.context() as context:
        context.setenv("EMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        context.setattr(similarity_module, "encoder", tiny_encoder)
        yield context


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ProfileConfig:
    checkpoint = tiny_moe(tmp_path_factory.mktemp("profiled"), family="mixtral", seed=3)
    return ProfileConfig(
        str(checkpoint), prompts=2, kl_prompts=1, depths=2, max_new_tokens=3, length_cap_tokens=4, source="fixture"
    )


@pytest.fixture(scope="module")
def profile(patch: pytest.MonkeyPatch, config: ProfileConfig) -> Profile:
    return measure_profile(config)


def test_every_task_is_measured_and_every_field_filled(profile: Profile) -> None:
    assert tuple(profile.tasks) == TASK_TYPES
    assert profile.n_layers == LAYERS
    for task in profile.tasks.values():
        assert task.depths == (2, LAYERS)
        assert len(task.similarities) == 2
        assert task.similarity_intervals == (), "two prompts are too few for an interval"
        assert len(task.layer_kl_nats) == LAYERS
        assert min(task.layer_kl_nats) > 0.0
        assert 0 < task.length_quantiles_tokens[0] <= task.expected_output_tokens <= 4 == task.length_cap_tokens
        assert [len(row) for row in task.coverage] == [EXPERTS + 1] * LAYERS
        assert task.loss_scale is not None
        assert task.loss_scale > 0
        assert (task.n_prompts, task.n_kl_prompts) == (2, 1)
        assert task.sensitive == mask_by_similarity(task, profile.threshold)


@pytest.mark.long
def test_the_same_seed_measures_the_same_profile(
    profile: Profile, config: ProfileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: pytest.MonkeyPatch
) -> None:
    # In an empty cache, so that nothing is merely read back; a task suffices.
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    again = measure_profile(replace(config, tasks=("qa",)))
    assert again.tasks["qa"] == profile.tasks["qa"]


def test_a_measured_profile_survives_its_file_and_serves_a_target(profile: Profile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "profile.json")
    assert Profile.load(path, profile.model_hash) == profile
    plan = choose(Profile.load(path), 0.0, [EXPERTS] * LAYERS, TOP_K)
    assert set(plan.exact) == set(TASK_TYPES)


def test_without_disturbance_answers_are_equal_and_divergences_zero(
    profile: Profile, config: ProfileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of what the profile's cache holds, only what the undisturbed model says.
    shutil.copytree(cache_dir() / "references", tmp_path / "references")
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(disturbance, "_scrambler", lambda experts, generator: lambda module, args, output: None)
    found = measure_profile(replace(config, tasks=("qa", "code"))).tasks.values()
    assert all(task.layer_kl_nats == (0.0,) * LAYERS for task in found)
    assert all(task.similarities == pytest.approx((1.0, 1.0)) for task in found)
    assert not any(any(task.sensitive) for task in found)


def test_an_old_profile_is_read_and_only_extended(profile: Profile, config: ProfileConfig, tmp_path: Path) -> None:
    bare = {name: replace(task, coverage=(), loss_scale=None) for name, task in profile.tasks.items()}
    path = replace(profile, tasks=bare).save(tmp_path / "old.json")
    content = path.read_text().replace('"format": 3', '"format": 2')
    assert '"format": 2' in content
    path.write_text(content)
    old = Profile.load(path)
    with pytest.raises(ProfileError, match="--extend"):
        choose(old, 0.01, [EXPERTS] * LAYERS, TOP_K)
    assert extend_profile(old, config) == profile


def test_a_profile_is_found_by_its_model_once_it_is_stored(profile: Profile, config: ProfileConfig) -> None:
    with pytest.raises(DataError, match="emoe model profile"):
        stored_profile(config.model)
    profile.save(profile_path(profile.model_hash))
    assert stored_profile(config.model) == profile


def test_coverage_is_judged_on_prompts_that_were_not_counted(config: ProfileConfig, patch: pytest.MonkeyPatch) -> None:
    texts = config.texts("qa")
    trace = reference_outputs(
        config.model, texts, ["qa"] * 2, max_new_tokens=config.length_cap_tokens, dtype="float32"
    ).trace
    found = np.array(coverage(trace, [EXPERTS] * LAYERS))
    first, second = trace.counts(0), trace.counts(1)
    for layer in range(LAYERS):
        one, other = np.argmax(first[layer]), np.argmax(second[layer])
        expected = (second[layer][one] / second[layer].sum() + first[layer][other] / first[layer].sum()) / 2
        assert found[layer][1] == pytest.approx(expected, abs=1e-5)
    assert (np.diff(found, axis=1) >= -1e-5).all()
    assert (found[:, 0] == 0).all()
    assert (found[:, -1] == 1).all()
