"""Wrong routing on purpose: it disturbs what it says, and replayed layers change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import emoe_core
from workbench.models.reference.tiny import tiny_moe
from workbench.quality.profile.disturbance import layer_divergences, random_routing
from workbench.quality.token_quality import compare
from workbench.replay.scoring import score

PROMPT, ANSWER = [5, 9, 12, 7, 30], [8, 4, 21]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[emoe_core.Engine]:
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral", seed=2)
    options = {"predictor": None, "dtype": "float32", "pack_dir": tmp_path / "packs", "record": True}
    with emoe_core.load(checkpoint, budget="100%", **options) as loaded:
        yield loaded


def _chosen(engine: emoe_core.Engine) -> torch.Tensor:
    engine.forget_trace()
    score(engine, [(PROMPT, ANSWER)])
    return torch.from_numpy(engine.trace().chosen.astype("int64"))


def test_only_the_given_layers_are_routed_at_random_and_only_for_a_while(engine: emoe_core.Engine) -> None:
    before = _chosen(engine)
    last = before.shape[1] - 1
    with random_routing(engine, [last], seed=1):
        disturbed = _chosen(engine)
    assert torch.equal(disturbed[:, :last], before[:, :last])
    assert not torch.equal(disturbed[:, last], before[:, last])
    assert all(len(set(row.tolist())) == before.shape[2] for row in disturbed[:, last])
    assert torch.equal(_chosen(engine), before)


def test_divergences_are_those_of_whole_passes_with_one_layer_disturbed(engine: emoe_core.Engine) -> None:
    tokens = torch.tensor(ANSWER)
    undisturbed = score(engine, [(PROMPT, ANSWER)])[0].logits
    expected = []
    for layer in range(len(engine.index.layers)):
        with random_routing(engine, [layer], seed=3):
            disturbed = score(engine, [(PROMPT, ANSWER)])[0].logits
        expected.append(float(compare(undisturbed, disturbed, tokens).kl_nats.mean()))
    assert layer_divergences(engine, PROMPT, ANSWER, seed=3) == expected
    assert max(expected) > 0
    assert torch.equal(score(engine, [(PROMPT, ANSWER)])[0].logits, undisturbed)
