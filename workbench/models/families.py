"""What emoe does with each Mixture-of-Experts family: proven on a tiny random checkpoint, and recorded.

`prove` is the proof: it writes a checkpoint of the family, loads it with stock transformers and through an engine that
holds too few experts, and compares logits, and the answers of four simultaneous requests with ``generate``. The table
that `emoe model families` shows is a record of its answers (``families.json``), which the tests repeat family by
family; it says nothing that a test does not.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import emoe_core
from emoe_core.checkpoint.families import REFUSED, class_name
from emoe_core.checkpoint.index import CheckpointIndex
from emoe_core.errors import ExperimentError, UnsupportedFamilyError
from emoe_core.experts.layer import handle_of
from emoe_core.experts.router import watching
from emoe_core.planning.tasks import UNKNOWN
from emoe_core.scheduler import BatchLimits, make_scheduler
from emoe_core.serving.loop import ServingLoop
from workbench.models.reference.tiny_families import FIRST_PLAIN_TOKEN, VOCABULARY, tiny_family

RECORD = Path(__file__).with_name("families.json")
# About two of eight experts a layer, so that experts are really missed and evicted.
BUDGET = "30%"
PROMPT_TOKENS = 17
# Between weights in float32 and those that a rule computes from the logits.
MAX_SHARE_ERROR = 1e-4
EXACT_ONLY = "exact only"
# Four requests at once; the longest goes beyond the sliding windows of tiny families.
REQUEST_TOKENS = (5, 17, 9, 30)
ANSWER_TOKENS = 12
# Between log-probabilities: below, either token is right in a batch, whose products round by their shape.
CLOSE_CALL = 1e-3
TOGETHER = "together"
# Their attention picks (indexes) or compresses earlier tokens, and takes padding for tokens: a prompt that is padded is
# answered otherwise than alone, in stock transformers too.
PADDING_CHANGES = (
    "axk2",
    "deepseek_v32",
    "deepseek_v4",
    "dots3_note",
    "dots3_note_text",
    "glm_moe_dsa",
    "hy_v4",
    "mistral_large4",
)


@dataclass(frozen=True)
class FamilyRow:
    """What was proven of one family.

    Attributes
    ----------
    model_type : str
    model_class : str
        The class of transformers that is served.
    on_disk : str
        "one by one" (a tensor for each expert) or "fused" (one for all experts of a layer).
    layout : tuple of str
        What is unusual about its experts.
    rerouting : str
        The routing rules of its layers, or `EXACT_ONLY`.
    requests : str
        `TOGETHER` where they share a batch, else why they run one at a time.
    refused : str
        Why it cannot be served; empty if it is served, and then it is exact.
    """

    model_type: str
    model_class: str
    on_disk: str = ""
    layout: tuple[str, ...] = ()
    rerouting: str = ""
    requests: str = ""
    refused: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return what a table shows: model type, class, experts on disk, exactness, rerouting or refusal, requests."""
        if self.refused:
            return self.model_type, self.model_class, "", "refused", self.refused, ""
        on_disk = ", ".join((self.on_disk, *self.layout))
        together = TOGETHER if self.requests == TOGETHER else f"one at a time: {self.requests}"
        return self.model_type, self.model_class, on_disk, "exact", self.rerouting, together


def prove(model_type: str, folder: Path) -> FamilyRow:
    """Prove what emoe does with a family, on a tiny checkpoint that is written to an empty folder.

    Raises
    ------
    ExperimentError
        When the family is served but not exactly, rerouted other than its rule says, or simultaneous requests get other
        answers than alone.
    UnsupportedFamilyError, CheckpointError
        When it is refused.
    """
    model_class = tiny_family(folder, model_type)
    stock = model_class.from_pretrained(folder, experts_implementation="eager").eval()
    expected = _prefill_and_decode(stock)
    options: dict[str, Any] = {"budget": BUDGET, "predictor": None, "pack_dir": folder, "verify": "always"}
    with emoe_core.load(folder, **options) as engine:
        logits = _prefill_and_decode(engine.model)
        counters = engine.stats().counters
        if not all(torch.equal(mine, theirs) for mine, theirs in zip(logits, expected, strict=True)):
            raise ExperimentError(f"{model_type}: logits at tolerance 0 are not those of stock transformers")
        if not counters.evictions:
            raise ExperimentError(f"{model_type}: the prompt asked for too few experts to prove anything")
        requests = _check_requests(engine, stock, model_type)
        rules = _check_rules(engine, model_type)
        on_disk, layout = _on_disk(engine.index), _layout(engine)
    try:
        with emoe_core.load(folder, tolerance=1.0, **options) as engine:
            logits = _prefill_and_decode(engine.model)
            rerouted = engine.stats().counters.reroutes
    except UnsupportedFamilyError:
        if rules is not None:
            raise
        rules = EXACT_ONLY
    else:
        if rules is None or not rerouted or not all(bool(part.isfinite().all()) for part in logits):
            raise ExperimentError(
                f"{model_type}: rerouting at tolerance 1 does not work ({rules}, {rerouted} reroutes)"
            )
    return FamilyRow(model_type, model_class.__name__, on_disk, layout, rules, requests)


def recorded() -> tuple[FamilyRow, ...]:
    """Return the record of every family, sorted by model type."""
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text())
    return tuple(FamilyRow(**(row | {"layout": tuple(row["layout"])})) for row in rows)


def refused() -> tuple[FamilyRow, ...]:
    """Return the rows of families that are refused by name."""
    return tuple(
        FamilyRow(model_type, class_name(model_type) or "", refused=reason) for model_type, reason in REFUSED.items()
    )


def as_markdown(rows: tuple[FamilyRow, ...]) -> str:
    """Return the document ``docs/families.md``."""
    served = [row for row in rows if not row.refused]
    rerouted = [row for row in served if row.rerouting != EXACT_ONLY]
    lines = [
        "# Model families",
        "",
        f"Of {len(rows)} model types with routed experts in transformers, {len(served)} are served bit-identically at "
        f"tolerance 0, {len(rerouted)} of them can be rerouted, and {len(rows) - len(served)} are refused. Each row is "
        "proven by `tests/core/checkpoint/test_families.py` on a tiny random checkpoint that transformers itself "
        "wrote: prefill and a decode step with a KV cache in float32, slots for 30% of the experts, the routing rule "
        "compared with the "
        "family's own router, and four simultaneous requests with the answers of `generate`. "
        "`emoe model families --check TYPE` repeats the proof; this file is `emoe model families --markdown`.",
        "",
        '*Experts on disk*: "one by one" is a tensor for each expert, "fused" one for all experts of a layer. '
        "*Rerouting* names what weights are proportional to, and what is added: a correction of the choice (bias), a "
        "factor per expert (scale), a limit to the best groups. *Requests* share a batch "
        "(together), or run one at a time, which serving does by itself. A class for images or sound is served whole, "
        "as transformers loads it; the proof is of text.",
        "",
        f"Padded batches agree within rounding with the prompt alone, but for {len(PADDING_CHANGES)} model types: "
        f"{', '.join(PADDING_CHANGES)}. Their attention picks or compresses earlier tokens and takes padding for "
        "tokens, so a padded prompt may be answered otherwise, in stock transformers too "
        "(`tests/core/serving/test_padding.py`).",
        "",
        "| model type | class in transformers | experts on disk | tolerance 0 | rerouting | requests |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def write_record(rows: list[FamilyRow]) -> None:
    """Write the record that `recorded` reads."""
    ordered = sorted(rows, key=lambda row: row.model_type)
    RECORD.write_text(json.dumps([asdict(row) for row in ordered], indent=1) + "\n")


def _prompt(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (1, PROMPT_TOKENS), generator=generator)


def _prefill_and_decode(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        first = model(input_ids=_prompt(0), use_cache=True)
        token = _prompt(1)[:, :1]
        second = model(input_ids=token, past_key_values=first.past_key_values, use_cache=True)
    return first.logits, second.logits


def _check_requests(engine: emoe_core.Engine, stock: Any, model_type: str) -> str:
    """Compare the answers of simultaneous requests with stock's alone; return how requests run."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (1, size), generator=generator) for size in REQUEST_TOKENS]
    failures: dict[int, Exception] = {}
    loop = ServingLoop(engine, make_scheduler("fcfs", None), BatchLimits(4, 4096), on_failure=failures.__setitem__)
    for prompt in prompts:
        loop.submit(prompt[0].tolist(), UNKNOWN, ANSWER_TOKENS)
    answers = {answer.number: list(answer.token_ids) for answer in loop.run()}
    for number, prompt in enumerate(prompts):
        if number in failures:
            raise ExperimentError(f"{model_type}: one of four requests failed: {failures[number]}")
        expected, close = _greedy(stock, prompt)
        differs = next((place for place in range(ANSWER_TOKENS) if answers[number][place] != expected[place]), None)
        if differs is not None and (engine.one_at_a_time is not None or not close[differs]):
            raise ExperimentError(
                f"{model_type}: of four simultaneous requests, {number} gets another answer than alone"
            )
    return engine.one_at_a_time or TOGETHER


def _greedy(stock: Any, prompt: torch.Tensor) -> tuple[list[int], list[bool]]:
    """Return the tokens of ``generate`` after a prompt [1, T], and where the second best was a close call."""
    kept, stock.generation_config.eos_token_id = stock.generation_config.eos_token_id, None
    try:
        with torch.no_grad():
            output = stock.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        stock.generation_config.eos_token_id = kept
    best = [logits[0].float().log_softmax(-1).topk(2).values for logits in output.logits]
    return output.sequences[0, prompt.shape[1] :].tolist(), [bool(two[0] - two[1] < CLOSE_CALL) for two in best]


def _check_rules(engine: emoe_core.Engine, model_type: str) -> str | None:
    """Compare rules with the routers on a new prompt; return the rules' names, None if a layer has none."""
    differing: list[int] = []
    modules = [engine.model.get_submodule(layer.name) for layer in engine.index.layers]

    def compare(handle: Any) -> Any:
        def asked(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
            # A layer's rule lies on the host.
            logits, index, weights = handle.router_logits.float().cpu(), index.cpu(), weights.float().cpu()
            shares = weights / weights.sum(-1, keepdim=True)
            chosen = handle.rule.choose(logits, index.shape[-1])
            error = (handle.rule.log_scores(logits).gather(1, index).softmax(-1) - shares).abs().max().item()
            if not torch.equal(chosen.sort(-1).values, index.sort(-1).values) or error > MAX_SHARE_ERROR:
                differing.append(handle.layer)

        return asked

    if not engine.reroutable:
        return None
    handles = {module: handle for module in modules if (handle := handle_of(module)) is not None}
    names = {handle.rule.name for handle in handles.values() if handle.rule is not None}
    explained = {module: compare(handle) for module, handle in handles.items() if handle.rule is not None}
    with torch.no_grad(), watching(explained):
        engine.model(input_ids=_prompt(2), use_cache=False)
    if differing:
        raise ExperimentError(f"{model_type}: the routing rules of MoE layers {differing} do not hold on a new prompt")
    return ", ".join(sorted(names))


def _on_disk(index: CheckpointIndex) -> str:
    return "fused" if index.fused else "one by one"


def _layout(engine: emoe_core.Engine) -> tuple[str, ...]:
    module: Any = engine.model.get_submodule(engine.index.layers[0].name)
    traits = {
        "transposed": getattr(module, "is_transposed", False),
        "biased": getattr(module, "has_bias", False),
        "interleaved": not getattr(module, "is_concatenated", True),
        "gateless": not getattr(module, "has_gate", True),
        "normalised": getattr(module, "has_post_expert_norm", False),
    }
    return tuple(name for name, holds in traits.items() if holds)
