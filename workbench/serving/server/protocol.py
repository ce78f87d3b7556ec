"""What a request asks for: an answer to each of its prompts, with three fields of our own.

Greedy where ``temperature`` is missing, unlike OpenAI's; with one, tokens are drawn by it, ``top_p`` and ``seed``
(itself drawn where it is missing) and nothing else: how a checkpoint's generation_config would draw is not asked. What
else that demands of answers (`emoe_core.serving.generation_rules`) holds for all; ``repetition_penalty`` and
``min_tokens`` replace it for one request.

``task`` (a task type; found from the words if missing), ``tolerance`` (the request's own miss tolerance) and ``slo``
(``{"ttft": seconds, "tpot": seconds}``). ``ignore_eos``, which load generators send, goes on to the token limit. What
becomes of other fields is said in `fields`.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from typing import Any

from emoe_core.errors import OptionError
from emoe_core.planning.classifier import classify
from emoe_core.planning.tasks import TASK_TYPES, UNKNOWN
from emoe_core.scheduler import NO_PROMISE, Objective
from emoe_core.serving.generation_rules import unknown_token
from emoe_core.serving.sampling import Sampling
from workbench.serving.server.conversation import conversation_text
from workbench.serving.server.fields import ChatRequest, Common, CompletionRequest, Slo, read_fields
from workbench.serving.server.limits import ApiError, ServerLimits
from workbench.serving.server.replies import Reply
from workbench.serving.server.served_model import ServedModel

# Each is sought in every character (OpenAI takes 4, lm-eval's tasks bring more), and so much text is held back.
MOST_STOPS = 16
LONGEST_STOP = 256


@dataclass(frozen=True)
class Wanted:
    """The answer to one prompt, as it was understood; it can be sent to another process."""

    prompt_ids: list[int]
    max_new_tokens: int
    task: str
    tolerance: float | None
    objective: Objective
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()
    to_limit: bool = False
    skip_special_tokens: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A request that was understood: an answer to each prompt, how they are told, fields that go unused."""

    wanted: tuple[Wanted, ...]
    stream: bool
    reply: Reply
    unused: tuple[str, ...]


def understand(body: bytes, chat: bool, served: ServedModel, limits: ServerLimits) -> Asked:
    """Return what a request asks for; `ApiError` 400 or 404 when it cannot be served."""
    asked, unused = read_fields(body, chat)
    if asked.model != served.name:
        raise ApiError(404, f"there is no model {asked.model!r} here, only {served.name!r}", code="model_not_found")
    if asked.task not in (None, UNKNOWN, *TASK_TYPES):
        raise ApiError(400, f"task {asked.task!r}: the task types are {', '.join(TASK_TYPES)}", param="task")
    if asked.tolerance and not served.reroutable:
        raise ApiError(400, "this model is served exactly only: leave tolerance out", param="tolerance")
    if isinstance(asked, ChatRequest):
        prompts = [_conversation(served, asked)]
        limit = asked.max_completion_tokens or asked.max_tokens
    else:
        prompts = _prompts(served, asked, limits.max_batch + limits.max_waiting)
        limit = asked.max_tokens
    wanted = tuple(
        Wanted(
            prompt_ids=ids,
            max_new_tokens=_output_tokens(served, ids, limit, asked.min_tokens, limits),
            task=asked.task or classify(text),
            tolerance=asked.tolerance,
            objective=NO_PROMISE if asked.slo is None else _objective(asked.slo),
            sampling=_sampling(asked),
            stop=_stop(asked.stop),
            to_limit=bool(asked.ignore_eos),
            skip_special_tokens=asked.skip_special_tokens is not False,
            settings=_settings(asked),
        )
        for ids, text in prompts
    )
    prompt_tokens = sum(len(one.prompt_ids) for one in wanted)
    include_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    return Asked(wanted, bool(asked.stream), Reply(served.name, chat, prompt_tokens, include_usage), unused)


def _sampling(asked: Common) -> Sampling | None:
    """Return how to draw; None is greedy: no temperature, or 0."""
    if not asked.temperature:
        return None
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    try:
        return Sampling(asked.temperature, 1.0 if asked.top_p is None else asked.top_p, seed)
    except OptionError as error:
        raise ApiError(400, str(error), param="temperature") from None


def _settings(asked: Common) -> dict[str, Any]:
    """Return what replaces the checkpoint's generation_config, by transformers' names."""
    own = {"repetition_penalty": asked.repetition_penalty, "min_new_tokens": asked.min_tokens}
    return {name: value for name, value in own.items() if value is not None}


def _stop(given: str | list[str] | None) -> tuple[str, ...]:
    stops = tuple(stop for stop in ([given] if isinstance(given, str) else given or []) if stop)
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise ApiError(400, f"stop: at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters", param="stop")
    return stops


def _objective(slo: Slo) -> Objective:
    return Objective(*(math.inf if promise is None else promise for promise in (slo.ttft, slo.tpot)))


def _conversation(served: ServedModel, asked: ChatRequest) -> tuple[list[int], str]:
    """Return a conversation's token ids, and the words that tell its task."""
    text = conversation_text(served.tokenizer, asked)
    said = [message.text() for message in asked.messages if message.role == "user"]
    ids = served.tokenizer(text, add_special_tokens=bool(asked.add_special_tokens))["input_ids"]
    return list(ids), said[-1] if said else ""


def _prompts(served: ServedModel, asked: CompletionRequest, most: int) -> list[tuple[list[int], str]]:
    """Return each prompt's token ids, and the words that tell its task."""
    given = asked.prompt
    prompts: list[Any] = given if isinstance(given, list) and not _is_prompt(given) else [given]
    if not all(_is_prompt(prompt) for prompt in prompts):
        raise ApiError(400, "prompt: give a string, a list of token ids, or a list of one of these", param="prompt")
    if len(prompts) > most:
        raise ApiError(400, f"{len(prompts)} prompts in one request: {most} can run and wait here", param="prompt")
    return [_prompt(served, prompt, asked.add_special_tokens is not False) for prompt in prompts]


def _is_prompt(given: Any) -> bool:
    """Return whether something is one prompt: a text, or token ids (an empty list of them is one, if a bad one)."""
    return isinstance(given, str) or (isinstance(given, list) and all(type(token) is int for token in given))


def _prompt(served: ServedModel, prompt: str | list[int], special: bool) -> tuple[list[int], str]:
    if isinstance(prompt, str):
        return list(served.tokenizer(prompt, add_special_tokens=special)["input_ids"]), prompt
    _require_known(served, prompt)
    # A model may have embeddings of more tokens than its tokenizer knows.
    known = [token for token in prompt if token < len(served.tokenizer)]
    return prompt, str(served.tokenizer.decode(known, skip_special_tokens=True))


def _require_known(served: ServedModel, ids: list[int]) -> None:
    unknown = next((token for token in ids if not 0 <= token < served.vocabulary), None)
    if unknown is not None:
        message = f"the prompt's {unknown_token(unknown, served.vocabulary, served.tokenizer)}"
        raise ApiError(400, message, param="prompt")


def _output_tokens(
    served: ServedModel, ids: list[int], asked: int | None, minimum: int | None, limits: ServerLimits
) -> int:
    inputs = len(ids)
    if not inputs:
        raise ApiError(400, "the prompt is empty: say what to continue", param="prompt")
    context = served.context_tokens
    longest, most = (min(limit, context - 1) for limit in (limits.max_prompt_tokens, limits.max_output_tokens))
    if inputs > longest:
        raise _too_long(f"the prompt has {inputs:,} tokens, the limit is {longest:,}", "prompt")
    _require_known(served, ids)
    if asked is not None and asked > most:
        raise _too_long(f"max_tokens is {asked:,}, the limit is {most:,}", "max_tokens")
    wanted = asked or int(min(limits.default_output_tokens, limits.max_output_tokens, max(1, context - inputs)))
    if inputs + wanted > context:
        raise _too_long(
            f"{inputs:,} tokens of prompt and {wanted:,} of answer exceed the model's {context:,}", "prompt"
        )
    if minimum is not None and minimum > wanted:
        raise ApiError(400, f"min_tokens is {minimum:,}, an answer has at most {wanted:,}", param="min_tokens")
    return wanted


def _too_long(message: str, param: str) -> ApiError:
    return ApiError(400, message, code="context_length_exceeded", param=param)
