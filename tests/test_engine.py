"""The engine's promises beside exactness: control loop, generation, isolation, and errors that name the fix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import emoe_core
from emoe_core.errors import BudgetError, CheckpointError, DataError, IntegrationError, OptionError, PackError
from emoe_core.planner import RunningRequest, expected_tokens, make_plan
from emoe_core.predictor import FrequencyPredictor
from emoe_core.routing import RoutingTrace
from workbench.reference_model.tiny import tiny_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("engine") / "model", family="mixtral", seed=4)


def test_generate_equals_stock_and_streams_the_same_text(model: Path, tmp_path: Path) -> None:
    pieces: list[str] = []
    with emoe_core.load(model, budget="40%", pack_dir=tmp_path) as engine:
        answer = engine.generate(["Hello there"], max_new_tokens=12, on_token=lambda _, text: pieces.append(text))[0]
        ids = torch.tensor([answer.prompt_ids])
    stock = AutoModelForCausalLM.from_pretrained(model, dtype="auto", experts_implementation="eager")
    expected = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert list(answer.token_ids) == expected[0, ids.shape[1] :].tolist()
    assert answer.text.startswith("".join(pieces))
    assert answer.ttft_s > 0


def test_score_is_the_log_softmax_of_stock_logits(model: Path, tmp_path: Path) -> None:
    prompt, answer = list(range(10, 20)), [30, 31, 32]
    with emoe_core.load(model, budget="1 slots", pack_dir=tmp_path) as engine:
        scored = engine.score([(prompt, answer)])[0]
    stock = AutoModelForCausalLM.from_pretrained(model, dtype="auto", experts_implementation="eager")
    with torch.no_grad():
        logits = stock(torch.tensor([[*prompt, *answer]]), logits_to_keep=4).logits[0, :-1].float()
    assert torch.equal(scored.logits, logits)
    assert torch.equal(scored.logprobs, logits.log_softmax(-1)[range(3), answer])


def test_predicts_before_every_pth_request_and_swaps_only_when_the_plan_changes(model: Path, tmp_path: Path) -> None:
    with emoe_core.load(model, budget="50%", tolerance=1.0, interval=3, pack_dir=tmp_path, record=True) as engine:
        assert engine.stats().cold_start
        for _ in range(7):
            engine.score([([1, 2, 3, 4], [5, 6])], ["qa"])
        counters = engine.stats().counters
        assert counters.predictions == 3
        assert 1 <= counters.swaps <= 2, "the same prompt again and again asks for the same experts"
        assert not engine.stats().cold_start
        trace = engine.trace()
    with emoe_core.load(model, budget="50%", tolerance=1.0, pack_dir=tmp_path) as engine:
        assert engine.warm_start(trace) == 7
        engine.score([([1, 2, 3, 4], [5, 6])], ["qa"])
        assert engine.stats().counters.swaps == 1
        assert engine.stats().counters.hits > 0
        assert not engine.stats().cold_start


def test_plan_follows_equation_two() -> None:
    shares = {"qa": np.array([[0.5, 0.3, 0.2]]), "code": np.array([[0.0, 0.1, 0.9]])}
    running = [RunningRequest("qa", 10), RunningRequest("qa", 20), RunningRequest("code", 5)]
    demand = expected_tokens(running, shares, lambda task, layer: True, lambda task: 10.0)
    np.testing.assert_allclose(demand, [[25.0, 15 + 1.5, 10 + 13.5]])
    assert make_plan(demand, [2]).experts == ((0, 2),)
    without_qa = expected_tokens(running, shares, lambda task, layer: task != "qa", lambda task: 10.0)
    assert make_plan(without_qa, [2]).experts == ((2, 1),)
    assert make_plan(np.zeros((1, 3)), [2]).is_empty


def test_frequency_predictor_decays_and_falls_back_to_all_tasks() -> None:
    predictor = FrequencyPredictor(1, 2, half_life=1.0)
    assert predictor.predict("qa") is None
    predictor.observe("qa", np.array([[4.0, 0.0]]))
    predictor.observe("qa", np.array([[0.0, 4.0]]))
    np.testing.assert_allclose(predictor.predict("qa"), [[1 / 3, 2 / 3]])
    np.testing.assert_allclose(predictor.predict("code"), predictor.predict("qa"))


def test_trace_round_trip_and_damage(model: Path, tmp_path: Path) -> None:
    with emoe_core.load(model, budget="100%", pack_dir=tmp_path, record=True) as engine:
        engine.score([([1, 2, 3], [4, 5])], ["code"])
        trace = engine.trace()
    path = trace.save(tmp_path / "trace.npz")
    again = RoutingTrace.load(path)
    assert np.array_equal(again.chosen, trace.chosen) and again.tasks == {0: "code"}
    assert again.counts(0).sum() == 5 * 2 * again.chosen.shape[1]
    assert again.mass_of_best(again.experts)[0] == pytest.approx(1.0)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"Record it again|record it again"):
        RoutingTrace.load(path)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bugdet": "40%"}, OptionError, "unknown option bugdet"),
        ({"policy": "fifo"}, OptionError, "lfu"),
        ({"predictor": "crystal ball"}, OptionError, "frequency"),
        ({"device": "tpu"}, OptionError, "cpu"),
        ({"tolerance": 1.5}, OptionError, r"\[0, 1\]"),
        ({"interval": 0}, OptionError, "interval"),
        ({"budget": "1KB"}, BudgetError, "short"),
        ({"budget": "much"}, BudgetError, "300MB"),
    ],
)
def test_bad_options_are_refused_with_the_fix(
    model: Path, tmp_path: Path, options: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        emoe_core.load(model, pack_dir=tmp_path, **options)


def test_missing_and_dense_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        emoe_core.load(tmp_path / "nowhere")
    small = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    LlamaForCausalLM(small).save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"(?i)moe|expert"):
        emoe_core.load(tmp_path / "dense", pack_dir=tmp_path)


def test_altered_pack_is_noticed_at_first_touch(model: Path, tmp_path: Path) -> None:
    with emoe_core.load(model, budget="50%", pack_dir=tmp_path) as engine:
        offset = engine.loader.storage.pack.layers[0].record_offset(0)
    file = next(tmp_path.glob("*.emoe"))
    raw = bytearray(file.read_bytes())
    for expert_byte in range(0, len(raw) - offset, 4096):
        raw[offset + expert_byte] ^= 0xFF
    file.write_bytes(raw)
    with emoe_core.load(model, budget="50%", pack_dir=tmp_path) as engine, pytest.raises(PackError, match="--force"):
        engine.score([(list(range(20)), [1])])


def test_the_model_refuses_what_it_cannot_do(model: Path, tmp_path: Path) -> None:
    with emoe_core.load(model, budget="50%", pack_dir=tmp_path) as engine:
        for name in ("save_pretrained", "state_dict", "to"):
            with pytest.raises(IntegrationError, match=name):
                getattr(engine.model, name)("cpu")
    with pytest.raises(IntegrationError, match="closed"):
        engine.model(torch.tensor([[1, 2]]))
    stray = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager")
    stray.set_experts_implementation("emoe")
    with pytest.raises(IntegrationError, match="belongs to no engine"), torch.no_grad():
        stray(torch.tensor([[1, 2]]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_zero_tolerance_is_bit_identical_to_eager_on_cuda(model: Path, tmp_path: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(model, dtype="auto", experts_implementation="eager").to("cuda")
    ids = torch.arange(20, device="cuda").unsqueeze(0)
    with emoe_core.load(model, budget="2 slots", device="cuda", pack_dir=tmp_path) as engine, torch.no_grad():
        assert torch.equal(engine.model(ids).logits, stock(ids).logits)
