"""Were a soak's answers right? Each question once more, alone, by the engine itself, at tolerance 0.

A step is a close call when logits that differ by rounding would choose another token; that is tried, not computed, so
that it holds for drawn tokens as well: noise of `ROUNDING` is added, a few times, before the same draw.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from soak import Question, Reply

import emoe_core
from emoe_core.planning.tasks import UNKNOWN
from emoe_core.scheduler import Request
from emoe_core.serving.batch import RunningBatch
from emoe_core.serving.generation_rules import GenerationRules, end_tokens
from emoe_core.serving.sampling import Sampler

ROUNDING = 1e-3
TRIES = 8


@dataclass(frozen=True)
class Offline:
    """The answer of generation alone: ``texts`` after each token, and which steps were close calls."""

    texts: tuple[str, ...]
    close: tuple[bool, ...]

    def judge(self, text: str) -> str:
        """Return "equal", "near" (it leaves this answer at a close call) or "wrong"."""
        if text == self.texts[-1]:
            return "equal"
        parted = next((place for place, own in enumerate(self.texts) if not text.startswith(own)), len(self.texts) - 1)
        # A character may take several tokens, and shows with the last of them.
        return "near" if any(self.close[max(0, parted - 3) : parted + 1]) else "wrong"


class _CloseCalls(Sampler):
    """Chooses as a sampler does, and notes where it was a close call."""

    def __init__(self, *of_sampler: Any) -> None:
        super().__init__(*of_sampler)
        self.close: list[bool] = []
        self._noise = torch.Generator().manual_seed(0)

    def _pick(self, logits: torch.Tensor) -> int:
        own = self._generator
        before = None if own is None else own.get_state()
        chosen, others = super()._pick(logits), set()
        after = None if own is None else own.get_state()
        for _ in range(TRIES):
            if own is not None and before is not None:
                own.set_state(before)
            noise = ROUNDING * torch.randn(logits.shape, generator=self._noise)
            others.add(super()._pick(logits.float().cpu() + noise))
        if own is not None and after is not None:
            own.set_state(after)
        self.close.append(others != {chosen})
        return chosen


def answer_alone(engine: emoe_core.Engine, question: Question, ends: Collection[int]) -> Offline:
    """Answer one question in a batch of its own."""
    assert engine.tokenizer is not None
    batch = RunningBatch(engine)
    processors = GenerationRules(engine).processors(question.prompt_ids, question.max_tokens)
    sampler = _CloseCalls(question.sampling, processors, question.prompt_ids, question.max_tokens)
    request = Request(UNKNOWN, len(question.prompt_ids), prompt_ids=question.prompt_ids, sampler=sampler)
    engine.passes.admit([request])
    try:
        with torch.no_grad():
            batch.prefill(request)
            while request.generated < question.max_tokens and request.tokens[-1] not in ends:
                for error in batch.step().values():
                    raise error
    finally:
        batch.abandon()
        batch.seat(())
    said = [token for token in request.tokens if token not in ends]
    texts = [
        str(engine.tokenizer.decode(said[: place + 1], skip_special_tokens=True)) for place in range(request.generated)
    ]
    whole = (*(text.rstrip("\ufffd") for text in texts[:-1]), texts[-1])
    return Offline(whole, tuple(sampler.close))


def judge(engine: emoe_core.Engine, asked: Sequence[Question], replies: Sequence[Reply]) -> dict[str, int]:
    """Return how many answers are equal to offline generation, near it, and wrong; the engine serves at tolerance 0."""
    assert engine.tokenizer is not None
    ends = end_tokens(engine, engine.tokenizer)
    known: dict[int, Offline] = {}
    counts = {"equal": 0, "near": 0, "wrong": 0}
    for reply in replies:
        if reply.text is None:
            continue
        if reply.question not in known:
            known[reply.question] = answer_alone(engine, asked[reply.question], ends)
        counts[known[reply.question].judge(reply.text)] += 1
    return counts
