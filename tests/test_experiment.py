"""Promises of one run of the bench on a tiny model: what its metrics count, and what they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from workbench import similarity
from workbench.configuration import ExperimentConfig
from workbench.experiment import Result, run_experiment
from workbench.reference_model.tiny import tiny_moe


def _alike(expected: Sequence[str], given: Sequence[str]) -> np.ndarray:
    return np.array([float(a == b) for a, b in zip(expected, given, strict=True)])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExperimentConfig]:
    with pytest.MonkeyPatch.context() as context:
        context.setenv("EMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        # MiniLM's package is not fetched by tests: equal texts stand in for alike ones.
        context.setattr(similarity, "similarity", _alike)
        checkpoint = tiny_moe(tmp_path_factory.mktemp("experiment"), family="mixtral", seed=3)
        yield ExperimentConfig(
            str(checkpoint),
            budget="3 slots",
            tolerance=0.5,
            interval=1,
            n_prompts=4,
            warm_prompts=2,
            max_new_tokens=4,
            source="fixture",
        )


@pytest.fixture(scope="module")
def silent(config: ExperimentConfig) -> Result:
    return run_experiment(config)


@pytest.fixture(scope="module")
def answered(config: ExperimentConfig) -> Result:
    return run_experiment(replace(config, answers=3))


def _untimed(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.endswith("_s")}


def test_free_answers_add_metrics_of_their_own_and_change_no_other(silent: Result, answered: Result) -> None:
    assert len(answered.answers) == 3 and silent.answers.empty
    found = _untimed(answered.metrics)
    assert {name: found.pop(name) for name in ("similarity", "similarity_prompts")}["similarity_prompts"] == 3
    assert found == _untimed(silent.metrics)
    assert _untimed(answered.stats) == _untimed(silent.stats)


def test_a_runs_counters_are_the_sums_of_its_prompts(answered: Result) -> None:
    assert answered.metrics["loads"] > 0 and answered.metrics["reroutes"] > 0
    for name in ("loads", "reroutes", "prefetches", "bytes_loaded"):
        assert answered.metrics[name] == answered.requests[name].sum(), name
