"""Tokens to text, piece by piece: what is passed on adds up to the text of the whole answer."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one answer as its tokens come. ``ends`` are the tokens that end it, which have no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._tokens: list[int] = []
        self._emitted = 0

    def push(self, token: int) -> str:
        """Take a token; return the new text, empty while a character is incomplete."""
        if token not in self._ends:
            self._tokens.append(token)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._new(text)

    def finish(self) -> str:
        """Return what is left."""
        return self._new(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _new(self, text: str) -> str:
        piece, self._emitted = text[self._emitted :], max(self._emitted, len(text))
        return piece
