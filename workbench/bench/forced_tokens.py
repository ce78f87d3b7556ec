"""The token ids that every system of a bench reads and decodes: the same for all, given beforehand.

Two sequences: one to warm up, one to time. Where the checkpoint carries recorded routing
(`workbench.models.synthetic`), they are consecutive tokens of that recording, prompts and answers as they came. A
random model without one gets random ids. A model that knows language reads the project's own fixture prompts, one after
the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from emoe_core.errors import OptionError
from emoe_core.experts.trace import RoutingTrace
from workbench.models.synthetic.writer import TRACE_FILE, label_of


@dataclass(frozen=True)
class ForcedTokens:
    """Token ids: prompt and decoded part of the warm-up, the same of the timed sequence, and where they come from."""

    warm_prompt: tuple[int, ...]
    warm: tuple[int, ...]
    prompt: tuple[int, ...]
    timed: tuple[int, ...]
    source: str


def forced_tokens(
    checkpoint: str | Path, vocab: int, prompt_tokens: int, warm_tokens: int, tokens: int, seed: int = 0
) -> ForcedTokens:
    """Return the token ids for a checkpoint.

    Raises
    ------
    OptionError
        When the checkpoint's recorded routing is shorter than what is asked for, or a model has no tokenizer.
    """
    sizes = (prompt_tokens, warm_tokens, prompt_tokens, tokens)
    label = label_of(checkpoint)
    if label is None:
        ids, source = _text(checkpoint, sum(sizes)), "the fixture's prompts"
    elif (Path(checkpoint) / TRACE_FILE).exists():
        trace = RoutingTrace.load(Path(checkpoint) / TRACE_FILE)
        ids, source = _recorded(trace, vocab, sizes), f"recorded routing ({label['routing']['source']})"
    else:
        ids = np.random.default_rng([seed, 5]).integers(0, vocab, sum(sizes)).tolist()
        source = "random ids; random routers"
    ends = np.cumsum((0, *sizes)).tolist()
    parts = [tuple(int(item) for item in ids[start:end]) for start, end in pairwise(ends)]
    return ForcedTokens(parts[0], parts[1], parts[2], parts[3], source)


def _recorded(trace: RoutingTrace, vocab: int, sizes: tuple[int, ...]) -> list[int]:
    """Return rows of the trace that follow each other, the timed prompt at the end of a recorded one if that fits."""
    available, needed = min(len(trace), vocab), sum(sizes)
    if needed > available:
        raise OptionError(
            f"the checkpoint's recorded routing has {available} tokens, {needed} are asked for: give fewer --tokens, "
            f"or write a checkpoint with a longer recording"
        )
    # Where an answer starts; the timed part should be decoding in the recording as well.
    answers = np.flatnonzero(trace.prefill[:-1] & ~trace.prefill[1:]) + 1
    before, after = sum(sizes[:3]), sizes[3]
    fitting = [int(row) for row in answers if before <= row <= available - after]
    start = (fitting[0] if fitting else before) - before
    return list(range(start, start + needed))


def _text(checkpoint: str | Path, count: int) -> list[int]:
    from emoe_core.generation import encode
    from workbench.systems.stock import required_tokenizer
    from workbench.workloads.fixture import fixture_rows

    tokenizer = required_tokenizer(checkpoint)
    ids: list[int] = []
    while len(ids) < count:
        for row in fixture_rows():
            ids += encode(tokenizer, row["prompt"])
    return ids[:count]
