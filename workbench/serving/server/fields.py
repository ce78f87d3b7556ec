"""The fields of requests: those that are served, and what becomes of the others.

A field that would change the answer is served or refused by its name, also one that nobody here has heard of. Known
fields that change nothing pass, and are named in a header of the answer (`UNUSED_HEADER`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from textwrap import shorten
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emoe_core.serving.sampling import LARGEST_SEED
from workbench.serving.server.limits import ApiError

UNUSED_HEADER = "x-emoe-unused-fields"
# OpenAI's and vLLM's, about accounts, storage, caches and tools that are not there. A dot leads into a field, and into
# the items of a list.
UNUSED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "prediction", "parallel_tool_calls", "request_id", "cache_salt",
    "stream_options.include_obfuscation", "stream_options.continuous_usage_stats", "messages.name",
    "messages.content.cache_control",
)  # fmt: skip
# Values of refused fields that ask for nothing, which clients send all the same. Null does so for every field.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    # Not OpenAI's: what vLLM's clients may send.
    "top_k": (0, -1),
    "min_p": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "documents": ([],),
    "include_reasoning": (True,),
    "priority": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    # Of messages, as OpenAI's client gives answers back.
    "messages.tool_calls": ([],),
    "messages.annotations": ([],),
}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow")


class Slo(_Fields):
    """What is promised, in seconds."""

    ttft: float | None = Field(default=None, gt=0)
    tpot: float | None = Field(default=None, gt=0)


class StreamOptions(_Fields):
    """How an answer is streamed."""

    include_usage: bool | None = False


class Common(_Fields):
    """What both kinds of request may bring."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    task: str | None = None
    tolerance: float | None = Field(default=None, ge=0, le=1)
    slo: Slo | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    min_tokens: int | None = Field(default=None, ge=0)
    stop: str | list[str] | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    add_special_tokens: bool | None = None


class CompletionRequest(Common):
    """Body of /v1/completions."""

    prompt: str | list[Any]


class Part(_Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def text(self) -> str:
        """Return what it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Common):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = None
    enable_thinking: Any = None


def read_fields(body: bytes, chat: bool) -> tuple[ChatRequest | CompletionRequest, tuple[str, ...]]:
    """Return a request's fields, and the names of those that go unused.

    Raises
    ------
    ApiError
        400, which names the field that cannot be served.
    """
    kind = ChatRequest if chat else CompletionRequest
    try:
        asked: ChatRequest | CompletionRequest = kind.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None
    unused = []
    for place, value in _others(asked):
        name = re.sub(r"\.\d+", "", place)
        if value is None or any(_equal(value, neutral) for neutral in NEUTRAL.get(name, ())):
            continue
        if name not in UNUSED:
            shown = f" with the value {shorten(repr(value), 60, placeholder=' ...')}" if name in NEUTRAL else ""
            raise unsupported(place, f"{place} is not served{shown}: leave it out")
        unused.append(name)
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    return asked, tuple(dict.fromkeys(unused))


def unsupported(param: str, message: str) -> ApiError:
    """Return the error of a field whose value is not served."""
    return ApiError(400, message, code="unsupported_value", param=param)


def _others(fields: _Fields, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of all fields that are none of ours, of what is inside as well."""
    for name, value in (fields.model_extra or {}).items():
        yield place + name, value
    for name in type(fields).model_fields:
        inside = getattr(fields, name)
        if isinstance(inside, _Fields):
            yield from _others(inside, f"{place}{name}.")
        elif isinstance(inside, list):
            for number, item in enumerate(inside):
                if isinstance(item, _Fields):
                    yield from _others(item, f"{place}{name}.{number}.")


def _equal(value: Any, neutral: Any) -> bool:
    """Compare, telling 0 from false: for ``logprobs``, 0 is a wish."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _invalid(error: ValidationError) -> ApiError:
    errors = error.errors()
    # Of a field that may be several things, the error that came furthest is about the one that was meant.
    first = max((item for item in errors if item["loc"][:1] == errors[0]["loc"][:1]), key=lambda item: len(item["loc"]))
    # Which of the things it was taken for stands in between.
    place = ".".join(str(part) for part in first["loc"] if part != "str" and not str(part).startswith("list["))
    return ApiError(400, f"{place or 'the body'}: {first['msg']}", param=place or None)
