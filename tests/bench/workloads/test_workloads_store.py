"""Preparing, storing and loading workloads, from packages and from the hub."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import pytest

from emoe_core.errors import DataError
from emoe_core.planning.tasks import TASK_TYPES
from workbench.workloads import (
    SPLITS,
    data_hash,
    describe,
    embedded,
    hub,
    is_prepared,
    load_task,
    prepare,
    split,
    store,
)
from workbench.workloads.records import Record


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "cache"


def squad_rows(n: int) -> list[dict]:
    def paragraph(number: int) -> dict:
        context = f"The mill of village {number} was built in {1300 + number} by the river."
        question = {"question": f"When was mill {number} built?", "answers": [{"text": str(1300 + number)}]}
        return {"context": context, "qas": [question]}

    return [{"title": f"Village {number}", "paragraphs": [paragraph(number)]} for number in range(n)]


def qa_records(n: int = 60) -> list[Record]:
    return list(embedded.READERS["qa"](squad_rows(n)))


def content_of(tasks: tuple[str, ...] = ("qa",)) -> dict:
    return {(task, name): load_task(task, name).to_list() for task in tasks for name in SPLITS}


def test_a_task_in_another_language_is_stored_by_itself_and_told_by_its_task(cache):
    reviews = [
        {"input": f"Der Arzt war sehr freundlich und hat mir am Tag {i} alles genau und ruhig erklärt, wie immer.",
         "target_scores": {"positive": 1, "negative": 0, "neutral": 0, "ambivalent": 0}}
        for i in range(60)
    ]  # fmt: skip
    store.build("classification_de", "embedded", embedded.READERS["classification"](reviews))
    items = load_task("classification_de", "test").to_list()
    assert {item["task"] for item in items} == {"classification"} and "multiemo/all_text_de" in items[0]["source"]
    assert all(item["prompt"].startswith("Classify the sentiment") and "freundlich" in item["prompt"] for item in items)
    assert not is_prepared("classification") and not is_prepared()
    with pytest.raises(DataError, match="unknown task 'classification_xx'"):
        load_task("classification_xx", "test")
    with pytest.raises(DataError, match="unknown task 'classification_de'"):
        prepare("classification_de", source="hub", progress=False)


def test_a_stored_task_holds_what_was_given_in_disjoint_splits(cache):
    store.build("qa", "embedded", qa_records())
    items = [item for rows in content_of().values() for item in rows]
    assert {item["reference"] for item in items} == {str(1300 + number) for number in range(60)}
    assert len({item["id"] for item in items}) == 60
    assert all(item["task"] == "qa" and item["reference"] in item["prompt"] for item in items)


def test_building_twice_gives_the_same_content_and_hash(cache):
    store.build("qa", "embedded", qa_records())
    first, first_hash = content_of(), data_hash("qa")
    store.build("qa", "embedded", reversed(qa_records()))
    assert content_of() == first and data_hash("qa") == first_hash
    store.build("qa", "embedded", qa_records(61))
    assert data_hash("qa") != first_hash


def test_a_task_that_was_not_prepared_names_the_command(cache):
    with pytest.raises(DataError, match="`emoe data prepare`"):
        load_task("qa", "test")


@pytest.mark.parametrize("damage", ["flip", "delete", "add", "manifest"])
def test_a_damaged_cache_names_the_command_that_mends_it(cache, damage):
    folder = store.build("qa", "embedded", qa_records())
    arrow = next(folder.glob("test/*.arrow"))
    if damage == "flip":
        content = bytearray(arrow.read_bytes())
        content[len(content) // 2] ^= 1
        arrow.write_bytes(content)
    elif damage == "delete":
        arrow.unlink()
    elif damage == "add":
        (folder / "test" / "more.arrow").write_bytes(b"x")
    else:
        (folder / store.MANIFEST).write_text("{")
    with pytest.raises(DataError, match="emoe data prepare --force"):
        load_task("qa", "test")


def test_a_failed_build_leaves_the_old_copy_and_no_debris(cache):
    folder = store.build("qa", "embedded", qa_records())
    before = content_of()

    def broken():
        yield qa_records(1)[0]
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        store.build("qa", "embedded", broken())
    with pytest.raises(DataError, match="too few items"):
        store.build("qa", "embedded", qa_records(1))
    assert content_of() == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["qa"]


def test_a_changed_recipe_makes_the_stored_copy_stale(cache, monkeypatch):
    store.build("qa", "embedded", qa_records())
    monkeypatch.setattr(store, "SEED", split.SEED + 1)
    with pytest.raises(DataError, match="another version"):
        load_task("qa", "test")


@pytest.mark.parametrize(
    ("task", "name", "source", "said"),
    [
        ("poetry", "test", "embedded", "known are qa"),
        ("qa", "dev", "embedded", "profile"),
        ("qa", "test", "ftp", "hub"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(cache, task, name, source, said):
    with pytest.raises(DataError, match=said):
        load_task(task, name, source)


def make_packages(folder: Path, monkeypatch, alter: str = "") -> None:
    """Put a source distribution (qa) and a wheel (code) of our own where fetched packages lie, and register them."""
    folder.mkdir(parents=True)
    squad = json.dumps({"data": squad_rows(40)}).encode()
    problems = [
        {"task_id": f"P/{n}", "prompt": f"def f{n}():\n", "canonical_solution": f"    return {n}\n"} for n in range(40)
    ]
    code = embedded.gzip.compress("\n".join(map(json.dumps, problems)).encode(), mtime=0)
    sdist, wheel = folder / "tasks-1.0.tar.gz", folder / "code-1.0-py3-none-any.whl"
    with tarfile.open(sdist, "w:gz") as tar:
        for name, content in (("tasks-1.0/other.json", b"{}"), ("tasks-1.0/squad.json", squad)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("data/code.jsonl.gz", code)

    def package(path: Path) -> embedded.Package:
        name, version = path.name.split("-")[0], "1.0"
        return embedded.Package(name, version, hashlib.sha256(path.read_bytes()).hexdigest(), "MIT")

    squad_path = "tasks-1.0/absent.json" if alter == "path" else "tasks-1.0/squad.json"
    squad_sha256 = "0" * 64 if alter == "sha256" else hashlib.sha256(squad).hexdigest()
    members = {
        "qa": embedded.Member(package(sdist), squad_path, squad_sha256),
        "code": embedded.Member(package(wheel), "data/code.jsonl.gz", hashlib.sha256(code).hexdigest()),
    }
    monkeypatch.setattr(embedded, "MEMBERS", members)


def test_prepare_takes_only_the_needed_files_out_of_the_packages(cache, monkeypatch):
    make_packages(cache / "packages", monkeypatch)
    ready = prepare(["qa", "code"], progress=False)
    assert {task: sum(map(len, ready[task].values())) for task in ready} == {"qa": 40, "code": 40}
    raw = sorted(path.name for path in (cache / "workloads" / "raw").rglob("*") if path.is_file())
    assert raw == ["data__code.jsonl.gz", "tasks-1.0__squad.json"]
    table = describe(("qa", "code"), count_tokens=len)
    assert table["items"].sum() == 80 and (table["prompt_tokens"] > table["prompt_words"]).all()


def test_prepared_data_needs_no_package_again_and_force_rebuilds_it(cache, monkeypatch):
    make_packages(cache / "packages", monkeypatch)
    assert not is_prepared("qa")
    prepare("qa", progress=False)
    assert is_prepared("qa") and not is_prepared(["qa", "code"])
    before = content_of()
    for package in (cache / "packages").iterdir():
        package.unlink()
    arrow = next(store.task_folder("qa").glob("test/*.arrow"))
    arrow.write_bytes(b"damaged")
    prepare("qa", progress=False, force=True)
    assert content_of() == before
    arrow.write_bytes(b"damaged")
    prepare("qa", progress=False)
    assert content_of() == before


@pytest.mark.parametrize(("alter", "said"), [("path", "does not hold"), ("sha256", "SHA-256")])
def test_a_package_of_another_build_is_refused(cache, monkeypatch, alter, said):
    make_packages(cache / "packages", monkeypatch, alter)
    with pytest.raises(DataError, match=said):
        prepare("qa", progress=False)
    assert not store.task_folder("qa").exists()


HUB_ROWS = {
    "qa": {
        "title": "T{n}",
        "context": "Mill {n} was built in 1{n}.",
        "question": "When?",
        "answers": {"text": ["1{n}"]},
    },
    "summarization": {"document": "A long story {n}.", "summary": "Story {n}."},
    "classification": {"tweet": "Shares of firm {n} rose.", "sentiment": 1},
    "comparison": {"claim": "It is {n}.", "evidence": "It was {n} metres.", "label": "REFUTES", "page": "P{n}"},
    "conversation": {"prompt": "Human: Hi {n}\nAssistant: Hello\nHuman: Bye\nAssistant: ", "response": "Bye {n}"},
    "code": {"task_id": "P/{n}", "prompt": "def f{n}():\n", "canonical_solution": "    return {n}\n"},
}
HUB_EXPECTED = {
    "qa": ("Passage: Mill 7 was built in 17.\n\nQuestion: When?", "17"),
    "summarization": ("Article: A long story 7.", "Story 7."),
    "classification": ("neutral, bullish or bearish. Reply with one word.\n\nText: Shares of firm 7 rose.", "bullish"),
    "comparison": ("Passage: It was 7 metres.\n\nClaim: It is 7.", "False"),
    "conversation": ("A: Hi 7\nB: Hello\nA: Bye", "Bye 7"),
    "code": ("```python\ndef f7():\n```", "    return 7"),
}


def use_local_hub(task: str, folder: Path, monkeypatch, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    source = hub.HUB_SOURCES[task]
    file = folder / f"{source.split}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    local = {**hub.HUB_SOURCES, task: dataclasses.replace(source, path=str(folder))}
    monkeypatch.setattr(hub, "HUB_SOURCES", local)


@pytest.mark.parametrize("task", TASK_TYPES)
def test_hub_columns_become_the_same_prompts(cache, tmp_path, monkeypatch, task):
    rows = [json.loads(json.dumps(HUB_ROWS[task]).replace("{n}", str(number))) for number in range(40)]
    use_local_hub(task, tmp_path / "set", monkeypatch, rows)
    ready = prepare(task, progress=False, source="hub")[task]
    assert sum(map(len, ready.values())) == 40
    ending, reference = HUB_EXPECTED[task]
    items = [item for name in SPLITS for item in ready[name]]
    assert [item["reference"] for item in items if item["prompt"].endswith(ending)] == [reference]
    with pytest.raises(DataError):
        load_task(task, "test", "embedded")


def test_a_hub_set_with_other_columns_is_refused_with_the_ones_found(cache, tmp_path, monkeypatch):
    use_local_hub("summarization", tmp_path / "set", monkeypatch, [{"document": "a", "highlights": "b"}])
    with pytest.raises(DataError, match=r"lacks the columns summary; it has .*highlights"):
        prepare("summarization", progress=False, source="hub")


def test_the_hub_offline_is_a_clear_error(tmp_path):
    code = (
        "from emoe_core.errors import DataError\nfrom workbench.workloads import prepare\n"
        "try:\n    prepare('qa', progress=False, source='hub')\nexcept DataError as error:\n    print(error)"
    )
    places = {"EMOE_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **places, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot load rajpurkar/squad from the hub" in result.stdout
    assert "HF_HUB_OFFLINE" in result.stdout and "emoe data prepare" in result.stdout


@pytest.mark.skipif(not is_prepared(), reason="run `emoe data prepare` first")
def test_integration_the_embedded_prompts_are_short_clean_and_never_shared_between_splits():
    seen: dict[str, str] = {}
    for task in (*TASK_TYPES, *(topic for topic in embedded.LANGUAGES if is_prepared(topic))):
        for name in SPLITS:
            items = load_task(task, name)
            assert (30 if task == "code" else 300) <= len(items) <= split.MAX_ITEMS_PER_SPLIT
            for item in items:
                assert seen.setdefault(item["id"], name) == name
                assert item["reference"].strip() and len(item["prompt"].split()) <= 400
                assert "canary" not in item["prompt"].lower() or "GUID" not in item["prompt"]
                assert not item["choices"] or item["reference"] in item["choices"]
    for name in ("profile", "test"):
        passages = {prompt.split("\n\n")[1] for prompt in load_task("qa", name)["prompt"]}
        trained = {prompt.split("\n\n")[1] for prompt in load_task("qa", "train")["prompt"]}
        assert not passages & trained
