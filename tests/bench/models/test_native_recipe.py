"""The native model: stopped training resumes to the same bits, and a recipe keeps what was trained, in 8 bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from emoe_core.errors import CheckpointError, OptionError
from recipes.corpora import DOMAINS, Texts
from recipes.native_evaluation import byte_length, measure
from recipes.native_training import (
    DECAY,
    LOG,
    STOP,
    Plan,
    Trainer,
    balance_loss,
    encoded,
    make_tokenizer,
    write_recipe,
)
from recipes.routing_readings import readings
from workbench.models.reference.native.build import ASSEMBLY
from workbench.models.reference.native.recipe import (
    LARGEST_CODE,
    STEP,
    TOKENIZER,
    Recipe,
    Shape,
    is_router,
    restored,
    stored,
)
from workbench.models.reference.recipe import ADAPTERS
from workbench.systems.stock import load_stock

SHAPE = Shape(vocabulary=300, hidden=16, layers=2, heads=2, kv_heads=1, experts=4, top_k=2, width=8, positions=64)
PLAN = Plan(steps=5, decay_steps=3, batch=2, length=8, decay_length=16, warmup_steps=2, look_every=2)


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
    assert PLAN.rate_at(3, 3, 3) == PLAN.rate and PLAN.rate_at(6, 3, 3) == pytest.approx(0.1 * PLAN.rate)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / DECAY).write_text("1")
    other = work(tmp_path / "other")
    assert other.run() and other.step == 1


def test_a_stop_file_ends_a_run_that_then_goes_on_and_looks_once_at_its_end(tmp_path: Path) -> None:
    plan = replace(PLAN, look_every=3)
    (tmp_path / STOP).touch()
    assert not work(tmp_path, plan).run() and not (tmp_path / LOG).exists()
    (tmp_path / STOP).unlink()
    assert work(tmp_path, plan).run() and work(tmp_path, plan).run()
    assert [json.loads(line)["step"] for line in (tmp_path / LOG).read_text().splitlines()] == [3, 6, 8]


def test_every_block_is_read_once_an_epoch_and_longer_ones_while_the_rate_falls(tmp_path: Path) -> None:
    trainer = work(tmp_path, replace(PLAN, steps=6))
    short = [tuple(row.tolist()) for step in range(6) for row in trainer.batch(step)]
    assert len(set(short)) == len(short) == 99 // 8 and {len(row) for row in short} == {8}
    long = [tuple(row.tolist()) for step in range(6, 12) for row in trainer.batch(step)]
    assert len(set(long)) == len(long) == 99 // 16 and {len(row) for row in long} == {16}


def test_layers_are_balanced_each_by_itself() -> None:
    # Two layers, each with a favourite of its own: together they look even.
    favourites = [10.0 * torch.eye(2)[[expert] * 6] for expert in (0, 1)]
    assert balance_loss(favourites, 1) == pytest.approx(2, abs=1e-3)
    assert balance_loss([10.0 * torch.eye(2).repeat(3, 1)], 1) == pytest.approx(1)


def test_a_recipe_s_weights_are_those_that_were_trained_rounded_to_8_bits(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in work(tmp_path).model.state_dict().items() if name != "lm_head.weight"}
    parts = stored(state)
    assert all(parts[name].dtype == torch.int8 for name in parts if name + STEP in parts)
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A finished tiny training and its recipe, with the text of every domain."""
    folder = tmp_path_factory.mktemp("native")
    texts = [Texts(domain.name, [f"{domain.about} {i}" for i in range(9)], [domain.about * 9]) for domain in DOMAINS]
    made = work(folder / "state")
    assert made.run()
    tokenizer = make_tokenizer([text for part in texts for text in part.fit], SHAPE)
    return made, write_recipe(folder / "recipe", made, texts, tokenizer)


def test_the_built_checkpoint_is_stock_and_computes_with_the_recipe_s_weights(
    trained: tuple[Trainer, Path], tmp_path: Path
) -> None:
    made, recipe = trained
    folder = ASSEMBLY.build(tmp_path / "built", recipe)
    built = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(built) is OlmoeForCausalLM and built.config.architectures == ["OlmoeForCausalLM"]
    state = {name: tensor for name, tensor in made.model.state_dict().items() if name != "lm_head.weight"}
    for name, tensor in restored(stored(state)).items():
        assert torch.equal(built.state_dict()[name], tensor), name
    assert ASSEMBLY.verify(folder) == ASSEMBLY.verify(ASSEMBLY.build(tmp_path / "again", recipe))
    assert "Not measured yet" in (folder / "README.md").read_text()


def test_an_altered_or_cut_recipe_is_refused_in_one_sentence(trained: tuple[Trainer, Path], tmp_path: Path) -> None:
    for name in (ADAPTERS, TOKENIZER):
        folder = tmp_path / name
        shutil.copytree(trained[1], folder)
        whole = (folder / name).read_bytes()
        for broken in (whole[:-20], whole[:-2] + b"??", b""):
            (folder / name).write_bytes(broken)
            with pytest.raises(CheckpointError, match=f"{name}.*the recipe was altered"):
                ASSEMBLY.build(tmp_path / "built", folder)
    (folder / TOKENIZER).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Recipe.open(folder)


def test_a_chat_comes_back_from_the_built_tokenizer(trained: tuple[Trainer, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSEMBLY.build(tmp_path / "built", trained[1]))
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi."}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(asked) == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    assert asked.count(1) == 2 and tokenizer.eos_token_id == 2
    ids = torch.tensor([0, *tokenizer("Grüße, 世界")["input_ids"]])
    assert byte_length(ids, tokenizer) == len("Grüße, 世界".encode())


def test_a_model_is_measured_on_every_domain(trained: tuple[Trainer, Path], tmp_path: Path) -> None:
    recipe = Recipe.open(trained[1])
    texts = [Texts(domain.name, [], [domain.about * 9, "other text " * 40]) for domain in DOMAINS]
    folder = ASSEMBLY.build(tmp_path / "built", recipe.folder)
    domains, routing = measure(load_stock(folder, torch.float32), recipe.tokenizer(), texts, 8, 4)
    assert list(domains) == [domain.name for domain in DOMAINS]
    assert all(0 < row["bits_per_byte"] < 20 and row["tokens"] == 28 for row in domains.values())
    assert routing["experts"] == 4 and 0 <= routing["nmi"] <= 1


def test_readings_tell_routing_that_stays_from_routing_that_does_not() -> None:
    # Four blocks a domain of one layer, 8 tokens, one choice of four experts: domain a uses expert 0, b uses expert 1.
    still = {name: torch.full((4, 1, 8, 1), expert) for expert, name in enumerate("ab")}
    found = readings(still, 4)
    assert (found["nmi"], found["reuse"], found["least_share"], found["most_share"]) == (
        pytest.approx(1),
        1,
        0,
        0.5,
    )
    assert found["same_domain"] == pytest.approx(1) and found["other_domain"] < 0
    quarter, half, _ = found["hit_rates"]
    # With one slot, each of eight blocks misses once in 8 tokens, and a hot list of one expert serves one domain.
    assert (quarter["lru"], quarter["hot_list"]) == (pytest.approx(7 / 8), pytest.approx(0.5))
    assert half["hot_list"] == 1 and half["lru"] == pytest.approx(1 - 2 / 64)
    turning = {name: torch.tensor([0, 1, 2, 3, 0, 1, 2, 0]).expand(4, 1, 8)[..., None] for name in "ab"}
    found = readings(turning, 4)
    assert (found["nmi"], found["reuse"]) == (pytest.approx(0), 0)
    half = found["hit_rates"][1]
    # Two slots: only the first token of a block finds its expert, the one that the block before ended with.
    assert (half["lru"], half["hot_list"]) == (pytest.approx(7 / 64), pytest.approx(5 / 8))


def test_the_committed_recipe_is_whole_and_small() -> None:
    recipe = Recipe.open()
    assert recipe.shape == Shape() and recipe.layers == recipe.shape.layers
    assert sum(entry.stat().st_size for entry in recipe.folder.iterdir()) < Recipe.limit_bytes + 1_000_000
    for number in range(recipe.layers):
        layer = recipe.layer(number)
        assert layer["mlp.experts.down_proj"].shape == (recipe.shape.experts, recipe.shape.hidden, recipe.shape.width)
        assert all(tensor.isfinite().all() for tensor in layer.values())
    assert [part["name"] for part in recipe.description["domains"]] == [domain.name for domain in DOMAINS]
