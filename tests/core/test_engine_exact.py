"""Integration: at tolerance 0 the engine is bit-identical to stock transformers' eager experts, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exact_passes import FAMILIES, prefill_and_decode, prompt_ids, stock

import emoe_core
from emoe_core.loader.eviction import POLICY_NAMES
from emoe_core.loader.slots import Policy
from workbench.models.reference.tiny import tiny_moe
from workbench.predictors.bounds import RandomPredictor
from workbench.replay.scoring import score
from workbench.systems.eviction_rules import RULES

DTYPES = (torch.float32, torch.bfloat16)
BUDGETS = ("1 slots", "30%", "60%", "100%")


@pytest.fixture(scope="module", params=[(family, dtype) for family in FAMILIES for dtype in DTYPES], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    family, dtype = request.param
    path = tiny_moe(tmp_path_factory.mktemp(family), family=family, seed=3, dtype=dtype)
    reference = stock(path, dtype)
    ids = prompt_ids(reference.config.vocab_size)
    return path, dtype, ids, prefill_and_decode(reference, ids)


@pytest.mark.parametrize("budget", BUDGETS)
def test_zero_tolerance_is_bit_identical_to_eager(case, budget: str, tmp_path: Path) -> None:
    path, _, ids, expected = case
    options = {"verify": "always", "pack_dir": tmp_path, "predictor": None}
    with emoe_core.load(path, budget=budget, **options) as engine:
        first = prefill_and_decode(engine.model, ids)
        again = prefill_and_decode(engine.model, ids)
        engine.loader.settle()
        engine.loader.table.check()
        stats = engine.stats()
    for run in (first, again):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(run, expected, strict=True))
    assert stats.counters.reroutes == 0
    assert stats.counters.lookups > 0
    assert stats.slot_bytes <= max(engine.plan.budget_bytes, engine.index.expert_bytes_total)
    if budget != "100%":
        assert stats.counters.evictions > 0


@pytest.mark.parametrize("policy", [*POLICY_NAMES, *RULES.values()])
def test_every_policy_is_exact(policy: str | Policy, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="mixtral", seed=3, dtype=torch.float32)
    ids = prompt_ids(stock(path, torch.float32).config.vocab_size)
    expected = prefill_and_decode(stock(path, torch.float32), ids)
    options = {"policy": policy, "predictor": RandomPredictor}
    with emoe_core.load(path, budget="3 slots", interval=1, pack_dir=tmp_path, verify="always", **options) as engine:
        for _ in range(3):
            mine = prefill_and_decode(engine.model, ids)
            assert all(torch.equal(got, want) for got, want in zip(mine, expected, strict=True))
        assert engine.stats().counters.predictions >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_step_by_step_is_bit_identical_to_decoding_with_stock(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=3, dtype=torch.float32)
    reference = stock(path, torch.float32)
    ids = prompt_ids(reference.config.vocab_size, tokens=12)[0].tolist()
    prompt, continuation = ids[:8], ids[8:]
    rows = []
    with torch.no_grad():
        output = reference(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        rows.append(output.logits[0, -1])
        for token in continuation[:-1]:
            output = reference(
                input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, logits_to_keep=1
            )
            rows.append(output.logits[0, -1])
    with emoe_core.load(path, budget="2 slots", predictor=None, pack_dir=tmp_path) as engine:
        scored = score(engine, [(prompt, continuation)], stepwise=True)[0]
    assert torch.equal(scored.logits, torch.stack(rows))
    assert scored.logprobs.shape == (len(continuation),)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_agrees_with_stock_on_real_rows_and_counts_only_them(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=3, dtype=torch.float32)
    reference = stock(path, torch.float32)
    ids = prompt_ids(reference.config.vocab_size, tokens=9, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    mask[1, :2] = 0
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask).logits
        with emoe_core.load(path, budget="2 slots", predictor=None, pack_dir=tmp_path) as engine:
            mine = engine.model(input_ids=ids, attention_mask=mask).logits
            counted = engine.stats().counters.token_lookups
            per_token = sum(engine.index.top_k for _ in engine.index.layers)
    torch.testing.assert_close(mine[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert counted == int(mask.sum()) * per_token


@pytest.mark.parametrize("family", FAMILIES)
def test_unpadded_batch_is_bit_identical(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=3, dtype=torch.bfloat16)
    reference = stock(path, torch.bfloat16)
    ids = prompt_ids(reference.config.vocab_size, tokens=9, batch=3)
    with emoe_core.load(path, budget="2 slots", predictor=None, pack_dir=tmp_path) as engine:
        mine = prefill_and_decode(engine.model, ids)
    expected = prefill_and_decode(reference, ids)
    assert all(torch.equal(got, want) for got, want in zip(mine, expected, strict=True))


def test_two_engines_and_a_stock_model_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="qwen3_moe", seed=3, dtype=torch.float32)
    reference = stock(path, torch.float32)
    ids = prompt_ids(reference.config.vocab_size)
    expected = prefill_and_decode(reference, ids)
    with (
        emoe_core.load(path, budget="2 slots", predictor=None, pack_dir=tmp_path) as small,
        emoe_core.load(path, budget="60%", tolerance=1.0, pack_dir=tmp_path) as lossy,
    ):
        for _ in range(2):
            lossy_logits = prefill_and_decode(lossy.model, ids)
            mine = prefill_and_decode(small.model, ids)
            theirs = prefill_and_decode(reference, ids)
            assert all(torch.equal(got, want) for got, want in zip(mine, expected, strict=True))
            assert all(torch.equal(got, want) for got, want in zip(theirs, expected, strict=True))
        assert not torch.equal(lossy_logits[0], expected[0])
        assert lossy.stats().counters.reroutes > 0
        assert small.stats().counters.reroutes == 0


def test_direct_generate_equals_stock_tokens(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="olmoe", seed=5, dtype=torch.float32)
    reference = stock(path, torch.float32)
    ids = prompt_ids(reference.config.vocab_size, batch=2)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with emoe_core.load(path, budget="50%", pack_dir=tmp_path) as engine:
        mine = engine.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(mine, theirs)
