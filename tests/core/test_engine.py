"""Promises of the engine: clear refusals, recovery after failures, its telemetry contract, generation and scoring."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

import emoe_core
from emoe_core import generation
from emoe_core.device import cpu_memory as heap
from emoe_core.errors import (
    BudgetError,
    CheckpointError,
    EmoeError,
    IntegrationError,
    OptionError,
    PackError,
    UnsupportedFamilyError,
)
from emoe_core.experts.compute import ExpertForm
from emoe_core.generation import encode
from emoe_core.loader.pack import Pack
from workbench.models.reference.tiny import FAMILIES, LAYERS, TOP_K, tiny_moe
from workbench.replay.scoring import score


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("engine"), family="mixtral", seed=9)


@pytest.fixture(scope="module")
def stock(model: Path):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager").eval()


def load(model: Path, tmp_path: Path, **options) -> emoe_core.Engine:
    return emoe_core.load(model, **({"budget": "2 slots", "pack_dir": tmp_path} | options))


def test_every_public_name_is_there() -> None:
    # They are imported on first use: a module that moved would not be missed before.
    assert {getattr(emoe_core, name).__name__ for name in emoe_core.__all__} == set(emoe_core.__all__)


IDS = torch.tensor([[5, 80, 9, 200, 31, 77]])


def forward(engine: emoe_core.Engine, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return engine.model(input_ids=ids).logits


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bugdet": "40%"}, OptionError, "unknown option bugdet: the options are attn_implementation, budget"),
        ({"policy": "clock"}, OptionError, "choose one of lru, decayed_demand"),
        ({"predictor": "oracle"}, OptionError, "choose one of frequency"),
        ({"device": "abacus"}, OptionError, "use 'auto', 'cpu' or 'cuda'"),
        ({"device": "meta"}, OptionError, "unknown device 'meta'"),
        ({"tolerance": 1.5}, OptionError, r"must lie in \[0, 1\]"),
        ({"tolerance": float("nan")}, OptionError, r"must lie in \[0, 1\]"),
        ({"tolerance": "high"}, OptionError, r"must lie in \[0, 1\]"),
        ({"interval": 0}, OptionError, "1 or more requests"),
        ({"replan": "never"}, OptionError, "admission, interval"),
        ({"tier": "tape"}, OptionError, "choose one of disk, host"),
        ({"verify": "maybe"}, OptionError, "choose one of first, always, never"),
        ({"threads": 0}, OptionError, "at least one thread"),
        ({"dtype": "int3"}, OptionError, "float32"),
        ({"budget": 5000}, BudgetError, "bytes short"),
        ({"budget": "plenty"}, BudgetError, "cannot understand"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_with_what_to_do(model: Path, tmp_path: Path, options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        load(model, tmp_path, **options)


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing", tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path, tmp_path)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="llama"):
        load(tmp_path / "dense", tmp_path)


def test_a_truncated_pack_is_written_again(model: Path, tmp_path: Path, stock) -> None:
    load(model, tmp_path).close()
    (pack,) = tmp_path.glob("*.emoe")
    whole = pack.read_bytes()
    pack.write_bytes(whole[:-4096])
    with pytest.raises(PackError, match="truncated"):
        Pack.open(pack)
    with load(model, tmp_path) as engine:
        assert torch.equal(forward(engine), forward_stock(stock))
    assert pack.stat().st_size == len(whole)


def test_an_altered_expert_is_noticed_and_the_engine_stays_usable(model: Path, tmp_path: Path, stock) -> None:
    load(model, tmp_path).close()
    (file,) = tmp_path.glob("*.emoe")
    content = file.read_bytes()
    altered = bytearray(content)
    for expert in range(8):
        altered[Pack.open(file).layers[1].record_offset(expert) + 100] ^= 1
    file.write_bytes(altered)
    with load(model, tmp_path, predictor=None) as engine:
        for _ in range(2):
            with pytest.raises(PackError, match=r"layer 1 .* was altered .*emoe model pack CHECKPOINT --force"):
                forward(engine)
        engine.loader.settle()
        engine.loader.table.check()
        assert all(entry.pins == 0 for entry in engine.loader.table.entries())
        counters = engine.stats().counters
        assert counters.bytes_loaded == (counters.loads + counters.prefetches) * engine.index.layers[0].record_bytes
        file.write_bytes(content)
        assert torch.equal(forward(engine), forward_stock(stock))


def forward_stock(stock, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return stock(input_ids=ids).logits


@pytest.mark.parametrize("name", emoe_core.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(emoe_core, name).__name__ == name


def test_a_closed_engine_says_so(model: Path, tmp_path: Path) -> None:
    engine = load(model, tmp_path)
    forward(engine)
    engine.close()
    engine.close()
    for call in (
        lambda: forward(engine),
        lambda: engine.generate(["hello"]),
        lambda: score(engine, [([1], [2])]),
        lambda: engine.model.generate(IDS, max_new_tokens=2),
    ):
        with pytest.raises(IntegrationError, match="closed"):
            call()
    assert engine.stats().counters.lookups > 0


@pytest.mark.parametrize("call", ["to", "half", "float", "state_dict", "save_pretrained"])
def test_moving_and_saving_the_model_is_refused(model: Path, tmp_path: Path, call: str) -> None:
    arguments = {"to": ["cpu"], "save_pretrained": [tmp_path / "copy"]}.get(call, [])
    with load(model, tmp_path) as engine:
        with pytest.raises(IntegrationError, match=r"load it with device|the original checkpoint"):
            getattr(engine.model, call)(*arguments)
        assert forward(engine).isfinite().all()


def test_emoe_without_an_engine_is_refused(model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager")
    plain.set_experts_implementation("emoe")
    with pytest.raises(IntegrationError, match="belongs to no engine"), torch.no_grad():
        plain(input_ids=IDS)


def test_gradients_are_refused(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path) as engine:
        embedded = engine.model.get_input_embeddings()(IDS).requires_grad_()
        with pytest.raises(IntegrationError, match="inference only"):
            engine.model(inputs_embeds=embedded)
        assert forward(engine).isfinite().all()


def test_rows_that_are_not_the_pass_s_are_refused(model: Path, tmp_path: Path) -> None:
    """Whose they are, and with which tolerance, would be unknown."""
    with load(model, tmp_path) as engine:
        experts = engine.model.get_submodule(engine.index.layers[1].name)
        half = experts.register_forward_pre_hook(lambda module, args: tuple(part[: len(part) // 2] for part in args))
        with pytest.raises(IntegrationError, match=r"MoE layer 1 was asked for \d+ rows in a pass over \d+ tokens"):
            forward(engine)
        half.remove()
        assert forward(engine).isfinite().all()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_while_a_model_is_looked_at_is_an_error_of_loading(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """And not a family that is served exactly only, or slowly."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(MixtralForCausalLM, "forward", fail)
        load(model, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(ExpertForm, "layer", fail)
        load(model, tmp_path)


def test_why_the_worse_way_is_taken_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise TypeError("a made-up reason")

    with load(model, tmp_path) as engine:
        told = engine.stats().to_dict()
        assert told["compute"] == "grouped by expert, each bit-equal to eager" and told["rerouting"] == "by its rule"
    with monkeypatch.context() as patch:
        patch.setattr(MixtralForCausalLM, "forward", fail)
        with load(model, tmp_path) as engine:
            assert "exact only" in engine.stats().rerouting and "a made-up reason" in engine.stats().rerouting
            assert engine.one_at_a_time is not None
        with pytest.raises(UnsupportedFamilyError, match="a made-up reason"):
            load(model, tmp_path, tolerance=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(ExpertForm, "layer", fail)
        with load(model, tmp_path) as engine:
            assert engine.stats().compute == "the family's eager code (TypeError: a made-up reason)"


def test_parameters_ask_for_gradients_as_stock_s_do_and_no_pass_records_any(model: Path, tmp_path: Path) -> None:
    """Whether they ask decides how torch computes some products, and thus how these round."""
    plain = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager")
    asked = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    with load(model, tmp_path) as engine:
        dense = dict(engine.model.named_parameters())
        assert {name: parameter.requires_grad for name, parameter in dense.items()}.items() <= asked.items()
        assert torch.is_grad_enabled() and not engine.model(input_ids=IDS).logits.requires_grad
        assert torch.is_grad_enabled()


def test_a_second_forward_pass_at_once_is_refused_and_the_first_goes_on(model: Path, tmp_path: Path, stock) -> None:
    refused: list[BaseException] = []

    def intrude(engine: emoe_core.Engine) -> None:
        for _ in range(2):
            try:
                forward(engine)
            except EmoeError as error:
                refused.append(error)

    with load(model, tmp_path) as engine:

        def during(module: torch.nn.Module, args, output) -> None:
            thread = threading.Thread(target=intrude, args=[engine])
            thread.start()
            thread.join()

        hook = engine.model.model.layers[0].register_forward_hook(during)
        assert torch.equal(forward(engine), forward_stock(stock))
        hook.remove()
        assert [type(error) for error in refused] == [IntegrationError] * 2
        assert "one forward pass at a time" in str(refused[0])
        assert torch.equal(forward(engine), forward_stock(stock))


def test_an_interrupted_pass_does_not_block_the_next(model: Path, tmp_path: Path, stock) -> None:
    with load(model, tmp_path) as engine:

        def interrupt(module: torch.nn.Module, args, output) -> None:
            raise KeyboardInterrupt

        hook = engine.model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            forward(engine)
        hook.remove()
        assert torch.equal(forward(engine), forward_stock(stock))
        engine.loader.table.check()


def test_an_unfinished_batch_keeps_others_out(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path) as engine:
        requests = engine.admit(["qa"], [3])
        with pytest.raises(IntegrationError, match="one batch at a time"):
            engine.generate(["hello"])
        engine.finish(requests)
        assert len(engine.generate(["hello"], max_new_tokens=2)) == 1


# Telemetry.


@pytest.mark.parametrize("tolerance", [0.0, 0.5, 1.0])
def test_the_telemetry_contract_holds(model: Path, tmp_path: Path, tolerance: float) -> None:
    with load(model, tmp_path, tolerance=tolerance, interval=2) as engine:
        engine.generate(["one", "two", "three two", "four"], max_new_tokens=5, batch_size=2)
        stats = engine.stats()
        flat = stats.to_dict()
        counters = stats.counters
        tokens = sum(len(encode(engine.tokenizer, text)) for text in ("one", "two", "three two", "four"))
    assert counters.hits + counters.loads + counters.reroutes == counters.lookups > 0
    assert counters.misses == counters.loads + counters.reroutes == flat["misses"]
    assert counters.token_hits + counters.token_loads + counters.token_reroutes == counters.token_lookups
    assert counters.bytes_loaded == (counters.loads + counters.prefetches) * engine.index.layers[0].record_bytes
    assert counters.wasted_bytes <= counters.bytes_loaded
    assert counters.token_lookups >= tokens * LAYERS * TOP_K
    assert flat["hit_rate"] == counters.hits / counters.lookups
    assert flat["slot_bytes"] == stats.slots * engine.index.layers[0].record_bytes <= engine.plan.budget_bytes
    assert stats.requests_served == 4
    assert (counters.reroutes > 0) == (tolerance > 0)


def test_a_prompt_counts_each_token_layer_and_choice_once(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, budget="100%", predictor=None) as engine:
        forward(engine)
        counters = engine.stats().counters
        assert counters.token_lookups == IDS.numel() * LAYERS * TOP_K
        assert counters.loads == counters.lookups and counters.hits == 0
        engine.reset_counters()
        forward(engine)
        again = engine.stats().counters
    assert again.hits == again.lookups == counters.lookups
    assert again.bytes_loaded == 0 and again.stall_s == 0 and again.hit_rate == 1.0


@pytest.mark.parametrize(("budget", "trims"), [("100%", False), ("2 slots", True)])
def test_memory_is_handed_back_during_prompts_only_under_a_budget(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str, trims: bool
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: counted.append)
    with load(model, tmp_path, budget=budget) as engine:
        forward(engine, torch.arange(3, 3 + heap.PROMPT_TOKENS)[None])
    assert bool(counted) == trims


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_both_tiers_are_exact(model: Path, tmp_path: Path, stock, tier: str) -> None:
    with load(model, tmp_path, tier=tier) as engine:
        assert torch.equal(forward(engine), forward_stock(stock))


# Generation and scoring.


def test_a_batch_of_one_gives_the_tokens_of_stock_generate(model: Path, tmp_path: Path, stock) -> None:
    prompts = ["What is a heron?", "Write a function.", "naive"]
    with load(model, tmp_path) as engine:
        answers = engine.generate(prompts, max_new_tokens=12)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([encode(engine.tokenizer, prompt)])
            assert answer.prompt_ids == tuple(ids[0].tolist())
            theirs = stock.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=256
            )
            assert list(answer.token_ids) == theirs[0, ids.shape[1] :].tolist()
            assert 0 < answer.ttft_s <= answer.total_s


def test_streamed_pieces_join_to_the_text(model: Path, tmp_path: Path) -> None:
    pieces: dict[int, list[str]] = {}
    prompts = [f"prompt {number}" for number in range(5)]
    with load(model, tmp_path) as engine:
        answers = engine.generate(
            prompts, max_new_tokens=10, batch_size=2, on_token=lambda row, text: pieces.setdefault(row, []).append(text)
        )
    assert ["".join(pieces.get(place, [])) for place in range(5)] == [answer.text for answer in answers]
    assert any(len(parts) > 1 for parts in pieces.values())


def test_an_answer_ends_at_its_end_of_sequence(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path) as engine:
        free = engine.generate(["hello"], max_new_tokens=6)[0]
        end = free.token_ids[2]
        engine.model.generation_config.eos_token_id = [end]
        stopped = engine.generate(["hello"], max_new_tokens=6)[0]
        first = free.token_ids.index(end)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.text == engine.tokenizer.decode(free.token_ids[:first], skip_special_tokens=True)


def test_a_padded_batch_answers_every_prompt_in_order(model: Path, tmp_path: Path) -> None:
    prompts = ["a", "a much longer prompt than the first", "middle size"]
    with load(model, tmp_path) as engine:
        answers = engine.generate(prompts, ["qa", None, "code"], max_new_tokens=4, batch_size=3)
        expected = [tuple(encode(engine.tokenizer, prompt)) for prompt in prompts]
    assert [answer.prompt_ids for answer in answers] == expected
    assert [answer.task for answer in answers] == ["qa", "unknown", "code"]
    assert all(1 <= len(answer.token_ids) <= 4 for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_log_softmax_of_stock_logits(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=9)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    prompt, continuation = [4, 8, 15], [16, 23, 42, 7]
    with load(path, tmp_path) as engine:
        scored = score(engine, [(prompt, continuation)], ["qa"])[0]
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([prompt + continuation]), use_cache=False, logits_to_keep=5).logits
    expected = logits[0, :-1].log_softmax(-1)
    assert torch.equal(scored.logits, logits[0, :-1])
    assert torch.equal(scored.logprobs, expected[range(4), continuation])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine: engine.generate("hello"), "pass a list"),
        (lambda engine: engine.generate(["hello"], ["qa", "code"]), "1 prompts came with 2 task types"),
        (lambda engine: engine.generate(["hello"], max_new_tokens=0), "1 or more"),
        (lambda engine: engine.generate(["hello"], batch_size=0), "1 or more"),
        (lambda engine: score(engine, [([], [1])]), "at least one prompt token"),
        (lambda engine: score(engine, [([1], [])]), "one continuation token"),
        (lambda engine: score(engine, [([1], [2])], ["qa", "qa"]), "1 sequences came with 2"),
        (lambda engine: engine.trace(), "record=True"),
    ],
)
def test_bad_calls_are_refused(model: Path, tmp_path: Path, call, message: str) -> None:
    with load(model, tmp_path) as engine:
        with pytest.raises(OptionError, match=message):
            call(engine)
        assert engine.generate(["hello"], max_new_tokens=1)


def test_a_model_without_tokenizer_says_how_to_be_called(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    with load(bare, tmp_path) as engine:
        assert engine.tokenizer is None
        with pytest.raises(OptionError, match="has no tokenizer"):
            engine.generate(["hello"])
        assert forward(engine).isfinite().all()


def test_a_static_cache_compiles_nothing(model: Path, stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = CompileConfig()
    # As on CUDA, where transformers compiles a pass with such a cache unasked.
    everywhere._compile_all_devices = True
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    expected = stock.generate(IDS, **settings)
    with load(model, tmp_path) as engine:
        monkeypatch.setattr(engine.model, "get_compiled_call", lambda config: pytest.fail("it was compiled"))
        found = engine.model.generate(IDS, cache_implementation="static", compile_config=everywhere, **settings)
    assert torch.equal(found, expected)


def test_a_token_s_time_is_taken_when_the_token_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Waits(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            happened.append(function.__name__)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(generation.time, "perf_counter", lambda: happened.append("clock") or 0.0)
    with Waits():
        generation.TokenWatch(None, set())(IDS, None)
    assert happened.index("tolist") < happened.index("clock")


# CUDA.


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("tier", ["disk", "host"])
@pytest.mark.parametrize("budget", ["1 slot", "50%", "100%"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_tolerance_is_bit_identical_to_eager_on_cuda(family: str, budget: str, tier: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=9, dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, experts_implementation="eager")
    reference = reference.eval().to("cuda")
    ids = IDS.to("cuda")
    with load(path, tmp_path, device="cuda", budget=budget, tier=tier, verify="always") as engine:
        for _ in range(3):
            assert torch.equal(forward(engine, ids), forward_stock(reference, ids))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_rerouting_runs_on_cuda(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, device="cuda", tolerance=1.0) as engine:
        forward(engine, IDS.to("cuda"))
        loads = engine.stats().counters.loads
        assert forward(engine, IDS.flip(1).to("cuda")).isfinite().all()
        assert engine.stats().counters.loads == loads
