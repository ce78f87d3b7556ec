"""Tokens to text, piece by piece: what is passed on adds up to the text of the whole answer.

A token's text depends on its neighbours: a character may take several, and decoders strip the first space of a text. So
new tokens are decoded behind the last ones that have been passed on, and passed on themselves once nothing to come can
change their text. What is decoded at a token does not grow with the answer. Any tokenizer will do that decodes a token
alike wherever it stands, a few neighbours given. (`tokenizers.decoders.DecodeStream` does not: it raises at bytes that
SentencePiece spells as tokens and that make no character, and knows no tidying of spaces.)
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

# A character has four bytes at most, hence as many tokens; what stands before more than those is settled.
_MARGIN = 4
# SentencePiece's way to spell what is not in its vocabulary.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# What `clean_up_tokenization` shortens begins with a space and has so many more characters at most: " n't".
_TIDIED = 3


class TextStream:
    """The text of one answer as its tokens come.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    ends : collection of int
        The tokens that end the answer, which have no text.
    skip_special_tokens : bool
        Whether other special tokens have none either.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._textless = frozenset(ends) | (_special_tokens(tokenizer) if skip_special_tokens else frozenset())
        # Tokens that were passed on, whose text alone is `_known`, and those that were not.
        self._context: list[int] = []
        self._known = ""
        self._fresh: list[int] = []
        self._tidies = _tidies(tokenizer)
        self._untidied: list[str] = []

    def push(self, token: int) -> str:
        """Take a token; return the new text, empty while it may still change."""
        spelled: Any = self._tokenizer.convert_ids_to_tokens(token)
        if token in self._textless or spelled is None:
            return ""
        self._fresh.append(token)
        # One invalid byte makes its whole run invalid, however long ago that began.
        if _BYTE_TOKEN.fullmatch(spelled):
            return ""
        count = len(self._fresh)
        text = self._text(count)
        if len(text) > len(self._known) and not text.endswith("\ufffd"):
            return self._tidy(self._settle(count, text))
        # Invalid characters, or tokens without text: those go that can no longer become anything else.
        if count >= 2 * _MARGIN:
            for settled in range(count - _MARGIN, count - 2 * _MARGIN, -1):
                if text.startswith(part := self._text(settled)):
                    return self._tidy(self._settle(settled, part))
        return ""

    def finish(self) -> str:
        """Return what is left."""
        count = len(self._fresh)
        return self._tidy(self._settle(count, self._text(count)), at_end=True)

    def _text(self, count: int) -> str:
        """Return the text of the context and some of the fresh tokens."""
        return self._decode(self._context + self._fresh[:count])

    def _decode(self, tokens: list[int]) -> str:
        wishes = {"clean_up_tokenization_spaces": False} if self._tidies else {}
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip, **wishes))

    def _settle(self, count: int, text: str) -> str:
        """Pass on some of the fresh tokens; ``text`` is the context's and theirs."""
        piece = text[len(self._known) :]
        settled, self._fresh = self._fresh[:count], self._fresh[count:]
        self._context, self._known = settled, self._decode(settled)
        return piece

    def _tidy(self, piece: str, at_end: bool = False) -> str:
        """Drop spaces before punctuation, as decoding all at once would; hold back where what follows decides."""
        if not self._tidies:
            return piece
        if piece:
            self._untidied.append(piece)
        last = "".join(self._untidied[-_TIDIED:])[-_TIDIED:]
        if not at_end and (len(last) < _TIDIED or " " in last):
            return ""
        text, self._untidied = "".join(self._untidied), []
        return self._tokenizer.clean_up_tokenization(text)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    try:
        added = tokenizer.added_tokens_decoder
    except NotImplementedError:
        added = {}
    return frozenset(tokenizer.all_special_ids) | {token for token, spelled in added.items() if spelled.special}


def _tidies(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether decoding drops spaces before punctuation; transformers ignores the wish for byte pair encoding."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return bool(tokenizer.clean_up_tokenization_spaces) and not isinstance(model, BPE)
