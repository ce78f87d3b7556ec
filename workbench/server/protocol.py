"""OpenAI's requests and answers, as far as they are served: one answer, with three fields of our own.

Greedy where ``temperature`` is missing, unlike OpenAI's; with one, tokens are drawn by it, ``top_p`` and ``seed``
(itself drawn where it is missing).

``task`` (a task type; found from the words if missing), ``tolerance`` (the request's own miss tolerance) and ``slo``
(``{"ttft": seconds, "tpot": seconds}``). ``ignore_eos``, which load generators send, goes on to the token limit. Other
fields that would change the answer are refused; the rest is ignored.
"""

from __future__ import annotations

import math
import secrets
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emoe_core.classifier import classify
from emoe_core.errors import OptionError
from emoe_core.generation import encode, encode_chat
from emoe_core.sampling import LARGEST_SEED, Sampling
from emoe_core.scheduler import Objective
from emoe_core.serving_loop import NO_PROMISE
from emoe_core.tasks import TASK_TYPES, UNKNOWN
from workbench.server.limits import ApiError, ServerLimits
from workbench.server.served_model import ServedModel

# OpenAI's limit; and one of ours, since every token is compared.
MOST_STOPS = 4
LONGEST_STOP = 256
# Fields that would change the answer, and the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    # Not OpenAI's: what vLLM's clients may send.
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
    "min_tokens": (None, 0),
    "stop_token_ids": (None, []),
}


class Slo(BaseModel):
    """What is promised, in seconds."""

    model_config = ConfigDict(extra="forbid")
    ttft: float | None = Field(default=None, gt=0)
    tpot: float | None = Field(default=None, gt=0)


class _Common(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    task: str | None = None
    tolerance: float | None = Field(default=None, ge=0, le=1)
    slo: Slo | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    stop: str | list[str] | None = None
    ignore_eos: bool | None = False


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class CompletionRequest(_Common):
    """Body of /v1/completions."""

    prompt: str | list[int] | list[str]


class ChatRequest(_Common):
    """Body of /v1/chat/completions."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Wanted:
    """A request that was understood; ``name`` is the answer's id. It can be sent to another process."""

    model: str
    chat: bool
    prompt_ids: list[int]
    max_new_tokens: int
    task: str
    tolerance: float | None
    objective: Objective
    stream: bool
    include_usage: bool
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()
    to_limit: bool = False
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def piece(self, text: str, finish: str | None = None) -> dict[str, Any]:
        """Return a chunk of a streamed answer."""
        if self.chat:
            choice: dict[str, Any] = {"delta": {"role": "assistant", "content": text} if finish is None else {}}
        else:
            choice = {"text": text}
        return self._answer(".chunk" if self.chat else "", [self._choice(choice, finish)])

    def whole(self, text: str, finish: str, output_tokens: int) -> dict[str, Any]:
        """Return an answer in one piece."""
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._answer("", [self._choice(choice, finish)]) | self.usage(output_tokens)

    def last(self, output_tokens: int) -> dict[str, Any]:
        """Return the chunk that holds the usage only."""
        return self._answer(".chunk" if self.chat else "", []) | self.usage(output_tokens)

    def usage(self, output_tokens: int) -> dict[str, Any]:
        """Return the count of tokens."""
        counts = {"prompt_tokens": len(self.prompt_ids), "completion_tokens": output_tokens}
        return {"usage": counts | {"total_tokens": sum(counts.values())}}

    def _answer(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name, kind = ("chatcmpl", "chat.completion") if self.chat else ("cmpl", "text_completion")
        return {
            "id": f"{name}-{self.name}",
            "object": kind + suffix,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


def understand(body: bytes, chat: bool, served: ServedModel, limits: ServerLimits) -> Wanted:
    """Return what a request asks for; `ApiError` 400 or 404 when it cannot be served."""
    kind = ChatRequest if chat else CompletionRequest
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{place or 'the body'}: {first['msg']}", param=place or None) from None
    if asked.model != served.name:
        raise ApiError(404, f"there is no model {asked.model!r} here, only {served.name!r}", code="model_not_found")
    for name, values in NEUTRAL.items():
        if (asked.model_extra or {}).get(name) not in values:
            raise ApiError(
                400, f"{name} is not served, and a request gets one answer: leave it out", "invalid_request_error",
                "unsupported_value", name,
            )  # fmt: skip
    if asked.task not in (None, UNKNOWN, *TASK_TYPES):
        raise ApiError(400, f"task {asked.task!r}: the task types are {', '.join(TASK_TYPES)}", param="task")
    if asked.tolerance and not served.reroutable:
        raise ApiError(400, "this model is served exactly only: leave tolerance out", param="tolerance")
    if isinstance(asked, ChatRequest):
        ids, text = _conversation(served, asked)
        limit = asked.max_completion_tokens or asked.max_tokens
    else:
        ids, text = _prompt(served, asked)
        limit = asked.max_tokens
    return Wanted(
        model=served.name,
        chat=chat,
        prompt_ids=ids,
        max_new_tokens=_output_tokens(served, len(ids), limit, limits),
        task=asked.task or classify(text),
        tolerance=asked.tolerance,
        objective=NO_PROMISE if asked.slo is None else _objective(asked.slo),
        stream=bool(asked.stream),
        include_usage=bool((asked.stream_options or {}).get("include_usage")),
        sampling=_sampling(asked),
        stop=_stop(asked.stop),
        to_limit=bool(asked.ignore_eos),
    )


def _sampling(asked: _Common) -> Sampling | None:
    """Return how to draw; None is greedy: no temperature, or 0."""
    if not asked.temperature:
        return None
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    try:
        return Sampling(asked.temperature, 1.0 if asked.top_p is None else asked.top_p, seed)
    except OptionError as error:
        raise ApiError(400, str(error), param="temperature") from None


def _stop(given: str | list[str] | None) -> tuple[str, ...]:
    stops = tuple(stop for stop in ([given] if isinstance(given, str) else given or []) if stop)
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise ApiError(400, f"stop: at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters", param="stop")
    return stops


def _objective(slo: Slo) -> Objective:
    return Objective(*(math.inf if promise is None else promise for promise in (slo.ttft, slo.tpot)))


def _conversation(served: ServedModel, asked: ChatRequest) -> tuple[list[int], str]:
    if not served.tokenizer.chat_template:
        raise ApiError(400, "this model has no chat template: use /v1/completions")
    messages = [{"role": message.role, "content": message.text()} for message in asked.messages]
    said = [message["content"] for message in messages if message["role"] == "user"]
    try:
        ids = encode_chat(served.tokenizer, messages)
    except (jinja2.TemplateError, ValueError) as error:
        raise ApiError(400, f"the model's chat template refuses these messages: {error}", param="messages") from None
    return ids, said[-1] if said else ""


def _prompt(served: ServedModel, asked: CompletionRequest) -> tuple[list[int], str]:
    prompt = asked.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        if len(prompt) > 1:
            raise ApiError(400, f"{len(prompt)} prompts in one request: send one each", param="prompt")
        prompt = prompt[0]
    if not isinstance(prompt, str):
        ids = [int(token) for token in prompt]
        if any(not 0 <= token < served.vocabulary for token in ids):
            raise ApiError(400, f"prompt holds token ids outside 0 to {served.vocabulary - 1}", param="prompt")
        return ids, str(served.tokenizer.decode(ids, skip_special_tokens=True))
    return encode(served.tokenizer, prompt, chat=False), prompt


def _output_tokens(served: ServedModel, inputs: int, asked: int | None, limits: ServerLimits) -> int:
    def refuse(message: str, param: str) -> ApiError:
        return ApiError(400, message, code="context_length_exceeded", param=param)

    if not inputs:
        raise ApiError(400, "the prompt is empty: say what to continue", param="prompt")
    if inputs > limits.max_prompt_tokens:
        raise refuse(f"the prompt has {inputs:,} tokens, the limit is {limits.max_prompt_tokens:,}", "prompt")
    if asked is not None and asked > limits.max_output_tokens:
        raise refuse(f"max_tokens is {asked:,}, the limit is {limits.max_output_tokens:,}", "max_tokens")
    context = served.context_tokens
    wanted = asked or int(min(limits.default_output_tokens, limits.max_output_tokens, max(1, context - inputs)))
    if inputs + wanted > context:
        raise refuse(f"{inputs:,} tokens of prompt and {wanted:,} of answer exceed the model's {context:,}", "prompt")
    return wanted
