"""Running prompts through an engine: greedy generation with timing, and teacher-forced scoring.

Decoding itself is transformers' own ``generate``; this module admits and ends requests around it, measures time to
the first token (TTFT, from admission, swapping included) and per output token (TPOT), and streams text.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from emoe_core.errors import OptionError, UnsupportedFamilyError
from emoe_core.planning.classifier import classify
from emoe_core.planning.tasks import UNKNOWN
from emoe_core.serving.generation_rules import GenerationRules, embedded_tokens, end_tokens, require_known_tokens
from emoe_core.text_stream import TextStream

if TYPE_CHECKING:
    from emoe_core.engine import Engine

OnToken = Callable[[int, str], None]
TokenPair = tuple[Sequence[int], Sequence[int]]


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


@dataclass(frozen=True)
class Scored:
    """Teacher-forced scores of one continuation of n tokens.

    Attributes
    ----------
    request : int
    logprobs : torch.Tensor
        Float32 [n]: natural log-probability of each given token.
    logits : torch.Tensor
        Float32 [n, vocabulary] on the CPU: the distribution each was scored under, before softmax.
    hidden : torch.Tensor
        What entered the output embedding, [n, hidden] on the CPU in the model's dtype; far smaller than the logits.
    total_s : float
        Wall seconds.
    """

    request: int
    logprobs: torch.Tensor
    logits: torch.Tensor
    hidden: torch.Tensor
    total_s: float


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


def score(
    engine: Engine,
    sequences: Sequence[TokenPair],
    tasks: Sequence[str | None] | None = None,
    stepwise: bool = False,
) -> list[Scored]:
    """Return the log-probabilities of given continuations.

    Parameters
    ----------
    engine : Engine
    sequences : sequence of (prompt ids, continuation ids)
        Both non-empty.
    tasks : sequence of str or None, optional
        Task type of each sequence; None is "unknown".
    stepwise : bool
        False: one forward pass per sequence. True: a pass for the prompt, then one for each token of the continuation,
        so that experts are asked for as they are while generating.
    """
    if tasks is not None and len(tasks) != len(sequences):
        raise OptionError(f"{len(sequences)} sequences came with {len(tasks)} task types: give one each, or none")
    accepts = inspect.signature(type(engine.model).forward).parameters
    scored = []
    for place, (prompt, continuation) in enumerate(sequences):
        if not len(prompt) or not len(continuation):
            raise OptionError(f"sequence {place} needs at least one prompt token and one continuation token")
        require_known_tokens(engine, [*prompt, *continuation])
        task = (tasks[place] if tasks is not None else None) or UNKNOWN
        started = time.perf_counter()
        ids = torch.tensor([[*prompt, *continuation]], device=engine.device)
        requests = engine.admit([task], [ids.shape[1]])
        seen: list[torch.Tensor] = []
        watch = engine.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        # The first pass ends with the prompt's last token, or with the whole sequence; the last row predicts nothing.
        first = len(prompt) if stepwise else ids.shape[1]
        rows, parts, cache = first - len(prompt) + 1, [], None
        try:
            with torch.no_grad():
                for start, end in [(0, first), *((place, place + 1) for place in range(first, ids.shape[1] - 1))]:
                    extra: dict[str, Any] = {"logits_to_keep": rows} if "logits_to_keep" in accepts else {}
                    output = engine.model(
                        input_ids=ids[:, start:end], past_key_values=cache, use_cache=stepwise, **extra
                    )
                    parts.append((output.logits[0, -rows:].float().cpu(), seen[-1][0, -rows:].cpu()))
                    rows, cache = 1, output.past_key_values if stepwise else None
                    if stepwise and cache is None:
                        raise UnsupportedFamilyError(
                            f"{type(engine.model).__name__} keeps no cache, so it cannot be scored step by step: use "
                            f"stepwise=False"
                        )
        finally:
            watch.remove()
            engine.finish(requests)
        logits, hidden = (torch.cat(part)[: len(continuation)] for part in zip(*parts, strict=True))
        targets = torch.tensor(continuation, dtype=torch.long).unsqueeze(-1)
        logprobs = logits.log_softmax(dim=-1).gather(1, targets).squeeze(-1)
        scored.append(Scored(requests[0].engine_number, logprobs, logits, hidden, time.perf_counter() - started))
    return scored


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
        self.times.append(time.perf_counter())
        if self._on_token is not None:
            for row, token in enumerate(input_ids[:, -1].tolist()):
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
