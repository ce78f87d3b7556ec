"""Promises of the replay evaluation: its bounds, its bytes, and that it serves what an engine serves."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import emoe_core
from emoe_core.errors import OptionError
from workbench.models.reference.tiny import EXPERTS, LAYERS, tiny_moe
from workbench.predictors import PREDICTORS
from workbench.predictors.bounds import OraclePredictor
from workbench.predictors.last_prompt import LastPromptPredictor
from workbench.replay.counting_loader import CountingLoader
from workbench.replay.prediction import PromptUse, compare, next_element_scores, prompt_uses, replay
from workbench.replay.scoring import score

TASKS = ("qa", "code")


def make_stream(seed: int, prompts: int = 12, layers: int = 2, experts: int = 5) -> list[PromptUse]:
    generator = np.random.default_rng(seed)
    uses = []
    for place in range(prompts):
        counts = generator.integers(0, 9, size=(layers, experts)).astype(float)
        counts[:, 0] += 1
        uses.append(PromptUse(TASKS[place % 2], int(counts[0].sum()), counts, counts * generator.random(counts.shape)))
    return uses


@given(seed=st.integers(0, 10**6), slots=st.integers(1, 5), name=st.sampled_from(sorted(PREDICTORS)))
@settings(max_examples=40)
def test_no_predictor_covers_more_than_hindsight(seed: int, slots: int, name: str) -> None:
    stream = make_stream(seed)
    summary, prompts = replay(stream, PREDICTORS[name](2, 5, seed), slots=slots)
    assert (prompts["mass"] <= prompts["oracle_mass"] + 1e-12).all()
    assert (prompts["weight_mass"] <= prompts["oracle_weight_mass"] + 1e-12).all()
    assert summary["skill"] <= 1 + 1e-12


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_the_oracle_at_every_prompt_is_the_bound_itself(slots: int) -> None:
    stream = make_stream(1)
    summary, _ = replay(stream, OraclePredictor([(use.task, use.counts) for use in stream]), slots=slots)
    assert summary["skill"] == pytest.approx(1.0)
    assert summary["of_oracle"] == pytest.approx(1.0)


def test_everything_resident_reads_one_and_moves_nothing() -> None:
    for name in PREDICTORS:
        summary, _ = replay(make_stream(2), PREDICTORS[name](2, 5, 0), slots=5, expert_bytes=7)
        assert summary["mass"] == summary["weight_mass"] == summary["recall"] == 1.0
        assert summary["moved_bytes"] == 0


def test_moved_and_wasted_bytes_of_a_stream_worked_out_by_hand() -> None:
    def use(expert: int) -> PromptUse:
        counts = np.eye(3)[[expert]] * 4
        return PromptUse("qa", 4, counts, counts)

    # One slot, always a prompt late: every expert but the last is loaded after its prompt, in time for another's.
    stream = [use(0), use(1), use(2), use(2)]
    summary, prompts = replay(stream, LastPromptPredictor(), slots=1, expert_bytes=10)
    assert prompts["mass"].tolist() == [1, 0, 0, 1]
    assert prompts["moved_bytes"].tolist() == [0, 0, 10, 10]
    assert summary["moved_bytes"] == 20 / 4
    assert summary["wasted_bytes"] == 10 / 4, "expert 1 left unused; 0 and 2 served"
    assert summary["mass"] == 0.5 and summary["skill"] == pytest.approx((0.5 - 1 / 3) / (1 - 1 / 3))


def test_a_longer_interval_predicts_less_often() -> None:
    found = {p: replay(make_stream(3), LastPromptPredictor(), slots=2, interval=p)[0] for p in (1, 4)}
    assert found[1]["predictions"] == 12 and found[4]["predictions"] == 3


def test_comparing_adds_the_oracle_and_warms_every_predictor() -> None:
    factories = {name: partial(PREDICTORS[name], 2, 5, 0) for name in ("frequency", "last_prompt")}
    steps: list[tuple[int, int]] = []
    stream = make_stream(4)
    table = compare(
        factories, {"mix": stream}, slots=[2, 3], warm=make_stream(5), progress=lambda *step: steps.append(step)
    )
    assert sorted(set(table["predictor"])) == ["frequency", "last_prompt", "oracle"]
    assert len(table) == 6 and steps[-1] == (6, 6)
    assert table.loc[table["predictor"] == "oracle", "skill"].min() == pytest.approx(1.0)
    cold = compare(factories, {"mix": stream}, slots=[2, 3])
    assert (cold["swaps"] < table["swaps"])[cold["predictor"] != "oracle"].all(), "a cold start has no first plan"


def test_next_element_scores_of_hindsight_are_one_and_of_a_constant_are_not() -> None:
    stream = make_stream(6)
    oracle = OraclePredictor([(use.task, use.counts) for use in stream])
    scores = next_element_scores(oracle, stream, top_k=2)
    assert scores["accuracy"] == scores["precision"] == scores["recall"] == scores["f1"] == 1.0
    worse = next_element_scores(LastPromptPredictor(), stream, top_k=2)
    assert worse["accuracy"] < 1 and worse["f1"] < 1


def test_a_use_is_what_the_trace_counts(tmp_path: Path) -> None:
    folder = tiny_moe(tmp_path / "model", seed=3)
    with emoe_core.load(folder, budget="100%", predictor=None, record=True, pack_dir=tmp_path) as engine:
        score(engine, [([1, 2, 3], [4, 5]), ([6, 7], [8])], ["qa", "code"])
        trace = engine.trace()
    uses = prompt_uses(trace)
    assert [use.task for use in uses] == ["qa", "code"]
    for place, request in enumerate(sorted(trace.tasks)):
        np.testing.assert_array_equal(uses[place].counts, trace.counts(request))
        np.testing.assert_allclose(uses[place].weights.sum(), trace.weight[trace.request == request].sum(dtype=float))
    assert uses[0].counts.shape == (LAYERS, EXPERTS)
    assert {use.task for use in prompt_uses(trace, "unknown")} == {"unknown"}


def test_more_slots_than_experts_are_refused() -> None:
    for slots in (0, 6):
        with pytest.raises(OptionError, match="slots a layer"):
            CountingLoader(2, 5, slots, 1)
