"""The native model: stopped training resumes to the same bits, and a recipe keeps what was trained, in 8 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import OlmoeForCausalLM

from emoe_core.errors import OptionError
from recipes.native_training import DECAY, LOG, Plan, Trainer, encoded, make_tokenizer
from workbench.models.reference.native.recipe import LARGEST_CODE, STEP, Recipe, Shape, is_router, restored, stored

SHAPE = Shape(vocabulary=300, hidden=16, layers=2, heads=2, kv_heads=1, experts=4, top_k=2, width=8, positions=64)
PLAN = Plan(steps=5, decay_steps=3, batch=2, length=8, warmup_steps=2, save_every=2, look_every=2)


def work(folder: Path, plan: Plan = PLAN) -> Trainer:
    folder.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(3, 300, 100).astype(np.uint16)
    held_out = {"a": torch.arange(3, 19).view(2, 8)}
    return Trainer(tokens, held_out, SHAPE, plan, seed=0, folder=folder)


def test_stopped_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight, stops = work(tmp_path / "straight"), 0
    assert straight.run() and straight.step == 8
    while not (stopped := work(tmp_path / "stopped")).run(stop_after=3):
        stops += 1
    assert stops == 2
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(stopped.model.state_dict()[name], tensor), name
    logs = [(tmp_path / name / LOG).read_text().splitlines() for name in ("straight", "stopped")]
    one, other = ([{**json.loads(line), "seconds": 0} for line in lines] for lines in logs)
    assert one == other and one[-1]["tokens"] == 8 * 2 * 8
    with pytest.raises(OptionError, match="another plan"):
        work(tmp_path / "stopped", replace(PLAN, rate=1e-3)).run()


def test_the_rate_falls_from_where_the_training_is_once_it_is_told_to(tmp_path: Path) -> None:
    told = work(tmp_path)
    told.run(stop_after=3)
    (tmp_path / DECAY).touch()
    assert told.run() and (told.stable, told.step) == (3, 6)
    assert PLAN.rate_at(3, 3) == PLAN.rate and PLAN.rate_at(6, 3) == pytest.approx(0.1 * PLAN.rate)


def test_every_block_is_read_once_an_epoch(tmp_path: Path) -> None:
    trainer = work(tmp_path)
    starts = [tuple(row.tolist()) for step in range(6) for row in trainer.batch(step)]
    assert trainer.blocks == 12 and len(set(starts)) == 12


def test_a_recipe_s_weights_are_those_that_were_trained_rounded_to_8_bits(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in work(tmp_path).model.state_dict().items() if name != "lm_head.weight"}
    parts = stored(state)
    assert all(parts[name].dtype == torch.int8 for name in parts if name + STEP in parts)
    recipe = Recipe.save_tensors(tmp_path / "recipe", parts, vars(SHAPE), {"layers": 2})
    assert recipe.shape == SHAPE
    for name, tensor in restored(parts).items():
        if tensor.dim() < 2 or is_router(name):
            assert torch.equal(tensor, state[name].to(torch.bfloat16)), name
            continue
        step = state[name].abs().amax(dim=-1, keepdim=True) / LARGEST_CODE
        # Half a step of rounding, and bfloat16's own of the step and of the product.
        assert ((tensor.float() - state[name]).abs() <= 0.5 * step + 2**-7 * state[name].abs() + 1e-6).all(), name
    model = OlmoeForCausalLM(SHAPE.config()).to(torch.bfloat16)
    missing = model.load_state_dict(restored(parts), strict=False)
    assert not missing.unexpected_keys and missing.missing_keys in ([], ["lm_head.weight"])


def test_any_text_comes_back_from_the_tokenizer() -> None:
    texts = ["Hello, world. Hello!", "def f(x):\n    return x", "Grüße, 世界 \U0001f600"]
    tokenizer = make_tokenizer(texts[:2], SHAPE)
    ids = encoded(texts, tokenizer)
    assert ids.dtype == np.uint16 and (ids == 0).sum() == 3
    assert tokenizer.decode(ids.tolist()) == "".join(texts)
