"""What answers look like: OpenAI's objects, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choice:
    """The answer to one prompt: its text, why it ended ("stop" or "length"), and how many tokens it has."""

    text: str
    finish: str
    tokens: int


@dataclass(frozen=True)
class Reply:
    """Everything that the objects of one answer have in common; ``name`` is its id."""

    model: str
    chat: bool
    prompt_tokens: int
    include_usage: bool
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def first(self) -> dict[str, Any]:
        """Return the chunk that a streamed chat begins with: who speaks."""
        return self._chunk([_choice(0, {"delta": {"role": "assistant", "content": ""}}, None)])

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Return a chunk of a streamed choice."""
        return self._chunk([_choice(index, {"delta": {"content": text}} if self.chat else {"text": text}, None)])

    def end(self, index: int, finish: str) -> dict[str, Any]:
        """Return the last chunk of a streamed choice."""
        return self._chunk([_choice(index, {"delta": {}} if self.chat else {"text": ""}, finish)])

    def usage(self, output_tokens: int) -> dict[str, Any]:
        """Return the chunk that holds the usage only."""
        return self._chunk([]) | self._usage(output_tokens)

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return an answer in one piece."""
        told = []
        for index, choice in enumerate(choices):
            message = {"message": {"role": "assistant", "content": choice.text}}
            told.append(_choice(index, message if self.chat else {"text": choice.text}, choice.finish))
        return self._answer("", told) | self._usage(sum(choice.tokens for choice in choices))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._answer(".chunk" if self.chat else "", choices) | ({"usage": None} if self.include_usage else {})

    def _usage(self, output_tokens: int) -> dict[str, Any]:
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": output_tokens}
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


def _choice(index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish}
