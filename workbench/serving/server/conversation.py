"""Messages to a prompt, by the model's chat template; nothing that a message says is lost on the way.

Templates are programs of others: some drop messages of roles that they do not know, or second system messages. Each
message is therefore looked for in the prompt, under a mark in place of its words. A developer's message, which newer
models know apart from the system's, is given as a system message to templates that have no place for it.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Mapping
from typing import Any

import jinja2.meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from emoe_core.generation import chat_text
from workbench.serving.server.fields import ChatRequest, unsupported
from workbench.serving.server.limits import ApiError

Turns = list[dict[str, str]]
# What `apply_chat_template` takes itself is no variable of a template.
_PARAMETERS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


def conversation_text(tokenizer: PreTrainedTokenizerBase, asked: ChatRequest) -> str:
    """Return the text of a conversation's prompt.

    Raises
    ------
    ApiError
        400, when the template refuses the messages, drops one, or does not know a variable.
    """
    if not tokenizer.chat_template:
        raise ApiError(400, "this model has no chat template: use /v1/completions")
    options = _options(tokenizer, asked)
    turns = [{"role": message.role, "content": message.text()} for message in asked.messages]
    problem: ApiError | None = None
    for variant in _variants(turns):
        try:
            text = chat_text(tokenizer, variant, **options)
        except Exception as error:  # whatever a template does with what the client sent
            message = f"the model's chat template refuses these messages: {error}"
            problem = problem or ApiError(400, message, param="messages")
            continue
        lost = _lost(tokenizer, variant, options)
        if lost is None:
            return text
        problem = problem or ApiError(
            400,
            f"messages.{lost}: the model's chat template leaves out this {turns[lost]['role']} message; say it in "
            f"another one",
            param=f"messages.{lost}",
        )
    assert problem is not None
    raise problem


def _variants(turns: Turns) -> list[Turns]:
    if all(turn["role"] != "developer" for turn in turns):
        return [turns]
    return [turns, [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in turns]]


def _lost(tokenizer: PreTrainedTokenizerBase, turns: Turns, options: Mapping[str, Any]) -> int | None:
    """Return the place of the first message whose words do not reach the prompt."""
    marks = [f"{secrets.token_hex(8)}x{place}x" for place in range(len(turns))]
    marked = [turn | {"content": mark} for turn, mark in zip(turns, marks, strict=True)]
    try:
        text = chat_text(tokenizer, marked, **options).lower()
    except Exception:  # the template wants other words: with those that were said, it had no complaint
        return None
    return next(
        (place for place, turn in enumerate(turns) if turn["content"].strip() and marks[place] not in text), None
    )


def _options(tokenizer: PreTrainedTokenizerBase, asked: ChatRequest) -> dict[str, Any]:
    """Return what the template is told beside the messages."""
    goes_on = bool(asked.continue_final_message)
    if goes_on and asked.add_generation_prompt:
        raise ApiError(
            400, "continue_final_message and add_generation_prompt exclude each other", param="add_generation_prompt"
        )
    begins = not goes_on and asked.add_generation_prompt is not False
    given = {f"chat_template_kwargs.{name}": value for name, value in (asked.chat_template_kwargs or {}).items()}
    own = {"reasoning_effort": asked.reasoning_effort, "enable_thinking": asked.enable_thinking}
    given |= {name: value for name, value in own.items() if value is not None}
    variables = {place.removeprefix("chat_template_kwargs."): value for place, value in given.items()}
    known = template_variables(tokenizer) if given else frozenset()
    for place, name in zip(given, (place.removeprefix("chat_template_kwargs.") for place in given), strict=True):
        if name not in known:
            raise unsupported(place, f"{place}: the model's chat template does not use it: leave it out")
    return {"add_generation_prompt": begins, "continue_final_message": goes_on, **variables}


def template_variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the names that a model's chat template reads, but for what it is always given."""
    source = tokenizer.get_chat_template()
    # Parsed as it is rendered: with the tags that transformers adds.
    environment = _compile_jinja_template(source).environment
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source))) - _PARAMETERS
