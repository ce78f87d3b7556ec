"""Running prompts through an engine: greedy generation with timing.

Decoding itself is transformers' own ``generate``; this module admits and ends requests around it, measures time to
the first token (TTFT, from admission, swapping included) and per output token (TPOT), and streams text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from emoe_core.errors import CheckpointError, OptionError
from emoe_core.planning.classifier import classify
from emoe_core.serving.generation_rules import GenerationRules, embedded_tokens, end_tokens, require_known_tokens
from emoe_core.serving.text_stream import TextStream

if TYPE_CHECKING:
    from emoe_core.engine import Engine

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
OnToken = Callable[[int, str], None]


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

    ``token_ids`` excludes the prompt and includes a closing end-of-sequence token. ``ttft_s`` and ``tpot_s`` are wall
    seconds of the batch the prompt ran in; ``tpot_s`` is None for a single token.
    """

    request: int
    task: str
    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    ttft_s: float
    tpot_s: float | None
    total_s: float

    @property
    def prompt_tokens(self) -> int:
        """Input length in tokens."""
        return len(self.prompt_ids)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a checkpoint's directory, or None where there is none.

    Code that comes with it is never run, nor is the hub asked.

    Raises
    ------
    CheckpointError
        When its files are damaged, or it exists only as code of its own.
    """
    # Asked for first: transformers would look for a missing one on the hub.
    if not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # damaged files, and those that need code of their own, raise many unrelated types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"the tokenizer of {path} cannot be loaded ({reason}). emoe never runs code that comes with a checkpoint: "
            f"save the tokenizer as tokenizer.json, or fetch the files again."
        ) from error
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool = True) -> list[int]:
    """Return a prompt's token ids, as a user's turn of the chat template where there is one."""
    if chat and tokenizer.chat_template:
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return list(tokenizer(prompt)["input_ids"])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the token ids of a conversation (messages with "role" and "content") by the model's chat template."""
    return list(tokenizer(chat_text(tokenizer, messages), add_special_tokens=False)["input_ids"])


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    **options: Any,
) -> str:
    """Return the text of a conversation by the model's chat template, which may take options of its own."""
    turns = [dict(message) for message in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options)
    return str(text)


def generate(
    engine: Engine,
    prompts: Sequence[str],
    tasks: Sequence[str | None] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 1,
    chat: bool = True,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Answer prompts greedily, in order, ``batch_size`` at a time (left-padded).

    Parameters
    ----------
    engine : Engine
    prompts : sequence of str
        User messages.
    tasks : sequence of str or None, optional
        Task type of each prompt; None is classified by keywords.
    max_new_tokens : int
        Output tokens at most, per prompt.
    batch_size : int
        Prompts per batch. Batches of 1 are bit-identical to stock at tolerance 0.
    chat : bool
        Apply the chat template.
    on_token : callable, optional
        Called with (place of the prompt, new text) as text arrives.

    Raises
    ------
    OptionError
        No tokenizer, counts below one, a prompt with tokens that the model does not have, or a generation_config that
        asks for what is not served (see `generation_rules`).
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise OptionError(
            f"{engine.index.path} has no tokenizer: save one beside the weights, or call engine.model.generate with "
            f"token ids"
        )
    if max_new_tokens < 1 or batch_size < 1:
        raise OptionError("max_new_tokens and batch_size must be 1 or more")
    if isinstance(prompts, str):
        raise OptionError("prompts is one text: pass a list of prompts, even for one")
    if tasks is not None and len(tasks) != len(prompts):
        raise OptionError(f"{len(prompts)} prompts came with {len(tasks)} task types: give one each, or none")
    GenerationRules(engine)  # raises where an answer would not be stock's
    named = [task or classify(prompt) for prompt, task in zip(prompts, tasks or [None] * len(prompts), strict=True)]
    done: list[Generation] = []
    for start in range(0, len(prompts), batch_size):
        ids = [encode(tokenizer, prompt, chat) for prompt in prompts[start : start + batch_size]]
        for row in ids:
            require_known_tokens(engine, row)
        relay = None if on_token is None else (lambda row, text, first=start: on_token(first + row, text))
        done += _generate_batch(engine, tokenizer, ids, named[start : start + batch_size], max_new_tokens, relay)
    return done


def _generate_batch(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    tasks: list[str],
    max_new_tokens: int,
    on_token: OnToken | None,
) -> list[Generation]:
    started = time.perf_counter()
    width = max(len(row) for row in ids)
    ends = end_tokens(engine, tokenizer)
    pad = _pad_token(engine, tokenizer, ends)
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=engine.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=engine.device)
    watch = TokenWatch(tokenizer, ends, on_token)
    model: Any = engine.model
    requests = engine.admit(tasks, [len(row) for row in ids])
    try:
        with torch.no_grad():
            output = model.generate(
                input_ids=inputs,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=sorted(ends) or None,
                return_dict_in_generate=False,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
    finally:
        engine.finish(requests)
    total_s = time.perf_counter() - started
    times = [moment - started for moment in watch.times]
    results = []
    for row, request in enumerate(requests):
        tokens = _until_end(output[row, width:].tolist(), ends)
        text = str(tokenizer.decode([token for token in tokens if token not in ends], skip_special_tokens=True))
        watch.finish(row)
        last = times[len(tokens) - 1]
        tpot_s = (last - times[0]) / (len(tokens) - 1) if len(tokens) > 1 else None
        results.append(
            Generation(
                request.engine_number, request.task, text, tuple(ids[row]), tuple(tokens), times[0], tpot_s, total_s
            )
        )
    return results


class TokenWatch(StoppingCriteria):
    """A stopping criterion that never stops: ``times`` are the moments each token came (s); text is passed on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int], on_token: OnToken | None = None) -> None:
        self.times: list[float] = []
        self._tokenizer = tokenizer
        self._ends = ends
        self._on_token = on_token
        self._streams: dict[int, TextStream] = {}
        self._ended: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        # A device may still be computing them: having them is what the clock is about.
        tokens = input_ids[:, -1].tolist()
        self.times.append(time.perf_counter())
        if self._on_token is not None:
            for row, token in enumerate(tokens):
                # What follows an end is padding.
                if row not in self._ended:
                    self._emit(row, self._stream(row).push(token))
                if token in self._ends:
                    self._ended.add(row)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def finish(self, row: int) -> None:
        """Pass on what is left of a row's text."""
        if self._on_token is not None:
            self._emit(row, self._stream(row).finish())

    def _stream(self, row: int) -> TextStream:
        return self._streams.setdefault(row, TextStream(self._tokenizer, self._ends))

    def _emit(self, row: int, text: str) -> None:
        if text and self._on_token is not None:
            self._on_token(row, text)


def _pad_token(engine: Engine, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int:
    """Return the tokenizer's padding, or another token where the model has no embedding of that: it is masked."""
    known = embedded_tokens(engine)
    return next((token for token in (tokenizer.pad_token_id, *sorted(ends)) if token is not None and token < known), 0)


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
