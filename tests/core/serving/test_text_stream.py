"""Promises of streamed text: pieces add up to the whole decode, for any tokens, at a cost that does not grow."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from emoe_core.serving.text_stream import TextStream
from workbench.models.reference.tiny import tiny_tokenizer

# Characters of one to four bytes; what tidying looks for; the replacement character itself.
TEXT = "a bé €字🦩 . , ! n't 's 've 're ' \ufffd"
SPECIAL = ["<s>", "</s>"]


def merged() -> PreTrainedTokenizerBase:
    """Return byte pair encoding whose tokens end within characters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    core.train_from_iterator([TEXT, "🦩🦪🦫€₭₮éèê字学宇" * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=True)


def byte_fallback() -> PreTrainedTokenizerBase:
    """Return Llama's kind: bytes as tokens of their own, and a text's first space stripped."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "▁é", "é", "b.", "\ufffd"]
    core = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, [], byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def word_pieces() -> PreTrainedTokenizerBase:
    """Return words and ends of words, tidied by the decoder and once more by transformers."""
    pieces = ["[UNK]", *SPECIAL, "a", "n", "##b", "##é", ".", ",", "'", "n't", "'s", "s", "t", "do", "字", "##'"]
    core = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=True)


def unigrams() -> PreTrainedTokenizerBase:
    """Return SentencePiece's unigrams with a mark before words, tidied by transformers."""
    pieces = ["<unk>", *SPECIAL, "▁", "▁a", "a", "▁n", "'", "t", "'t", ".", "▁.", "s", "▁'", "ve", "é", "▁▁"]
    core = Tokenizer(models.Unigram([(piece, -float(place)) for place, piece in enumerate(pieces)], 0))
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=True)


def python_bytes() -> PreTrainedTokenizerBase:
    """Return a tokenizer without a fast backend, which leaves invalid bytes out."""
    return ByT5Tokenizer(extra_ids=4)


MADE: list[Callable[[], PreTrainedTokenizerBase]] = [
    tiny_tokenizer, merged, byte_fallback, word_pieces, unigrams, python_bytes
]  # fmt: skip
KINDS = {make.__name__: cache(make) for make in MADE}


@st.composite
def answers(draw: st.DrawFn, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Draw token sequences: any, and those of texts, runs among them, with tokens that the tokenizer does not know."""
    beyond = 0 if isinstance(tokenizer, ByT5Tokenizer) else 5
    one = st.integers(0, len(tokenizer) - 1 + beyond)
    texts = st.text(TEXT, max_size=6).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    runs = st.tuples(one, st.integers(1, 12)).map(lambda run: [run[0]] * run[1])
    return [token for part in draw(st.lists(st.one_of(one.map(lambda token: [token]), texts, runs))) for token in part]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(deadline=None)
def test_pieces_add_up_to_the_whole_text(kind: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]()
    ends = {tokenizer.eos_token_id}
    tokens = data.draw(answers(tokenizer))
    stream = TextStream(tokenizer, ends, skip)
    pieces = [stream.push(token) for token in tokens]
    whole = tokenizer.decode([token for token in tokens if token not in ends], skip_special_tokens=skip)
    assert "".join(pieces) + stream.finish() == whole


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "merged", "byte_fallback"])
def test_a_character_is_passed_on_with_its_last_token(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokens = tokenizer.encode("a a a é a a", add_special_tokens=False)
    stream = TextStream(tokenizer, ())
    said = ""
    for place, token in enumerate(tokens):
        said += stream.push(token)
        known = tokenizer.decode(tokens[: place + 1])
        assert known.endswith("\ufffd") or said == known


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["text", "one token", "special", "byte", "two bytes", "space"])
def test_what_is_decoded_grows_with_the_answer_and_not_with_its_square(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, size = KINDS[kind](), 4000
    bytes_of = {"tiny_tokenizer": (220, 255), "merged": (220, 255), "byte_fallback": (0xE2 + 3, 0x82 + 3)}
    first, second = bytes_of.get(kind, (8, 9))
    repeated = {
        "text": tokenizer.encode(TEXT, add_special_tokens=False),
        "one token": [len(tokenizer) - 1],
        "special": [tokenizer.convert_tokens_to_ids(SPECIAL[1] if kind != "tiny_tokenizer" else "<|im_start|>")],
        "byte": [first],
        "two bytes": [first, second],
        "space": tokenizer.encode(" a", add_special_tokens=False),
    }[name]
    tokens = (repeated * size)[:size]
    decoded: list[int] = []
    plain = tokenizer.decode

    def counted(ids: list[int], **options: Any) -> str:
        decoded.append(len(ids))
        return str(plain(ids, **options))

    expected = plain(tokens, skip_special_tokens=True)
    monkeypatch.setattr(tokenizer, "decode", counted)
    stream = TextStream(tokenizer, ())
    text = "".join(stream.push(token) for token in tokens) + stream.finish()
    assert text == expected
    assert sum(decoded) <= 60 * size
