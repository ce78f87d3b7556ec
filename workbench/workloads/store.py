"""Prepared workloads on disk: build once, verify at every load.

A prepared task is a ``datasets.DatasetDict`` (splits profile, train, test) saved under the cache, beside a manifest
with the recipe's hash and the SHA-256 of every file. Columns of an item:

``id``         task and content hash
``task``       task type (also of a task in another language, which is stored under a name of its own)
``prompt``     the user's message, template applied, plain text
``reference``  target text, or the right label
``choices``    the labels to choose from, or empty
``source``     package or hub data set the item comes from

A folder under its final name is complete. A recipe that has changed since (template, limits, seed, source) makes the
stored copy stale: `prepare` rebuilds it, `load_task` refuses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from emoe_core.errors import DataError
from emoe_core.files import whole_folder
from emoe_core.planning.tasks import TASK_TYPES
from workbench.fetch import cache_dir, sha256_file
from workbench.workloads import embedded, hub
from workbench.workloads.records import MAX_WORDS, TEMPLATES, Record, render, task_of
from workbench.workloads.split import MAX_ITEMS_PER_SPLIT, SEED, SPLITS, choose, item_id

if TYPE_CHECKING:
    import datasets

FORMAT = 1
SOURCES = ("embedded", "hub")
MANIFEST = "manifest.json"


def features() -> datasets.Features:
    """Return the columns of an item. Importing ``datasets`` takes a second, and machines that only measure lack it."""
    import datasets

    text = datasets.Value("string")
    columns = dict.fromkeys(("id", "task", "prompt", "reference"), text)
    return datasets.Features({**columns, "choices": datasets.List(text), "source": text})


def task_names(tasks: Sequence[str] | str | None, source: str = "embedded") -> tuple[str, ...]:
    """Return the given task names, checked against what a source has; all task types for None."""
    if tasks is None:
        return TASK_TYPES
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    known = (*TASK_TYPES, *embedded.LANGUAGES) if source == "embedded" else TASK_TYPES
    if unknown := [name for name in names if name not in known]:
        raise DataError(f"unknown task {', '.join(map(repr, unknown))}; known are {', '.join(known)}.")
    return names


def check_source(source: str) -> str:
    """Return the source's name, or raise `DataError` for one that does not exist."""
    if source not in SOURCES:
        raise DataError(f"unknown source {source!r} of prompts; known are {', '.join(SOURCES)}.")
    return source


def task_folder(task: str, source: str = "embedded") -> Path:
    """Return where a prepared task lies, whether or not it is there."""
    return cache_dir() / "workloads" / source / task


def source_name(task: str, source: str) -> str:
    """Return the data set an item is attributed to."""
    if source == "hub":
        return hub.HUB_SOURCES[task].path
    member = embedded.MEMBERS[task]
    return f"{member.package.name}=={member.package.version}:{member.path.rsplit('/benchmark_tasks/')[-1]}"


def recipe_hash(task: str, source: str) -> str:
    """Return a hash of all that decides a prepared task's content besides the raw file's bytes."""
    origin = embedded.MEMBERS[task].sha256 if source == "embedded" else hub.HUB_SOURCES[task].path
    parts = [FORMAT, task, source, origin, TEMPLATES[task_of(task)], dict(MAX_WORDS), SEED, MAX_ITEMS_PER_SPLIT]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(
    tasks: Sequence[str] | str | None = None,
    force: bool = False,
    progress: bool = True,
    source: str = "embedded",
) -> dict[str, datasets.DatasetDict]:
    """Make the workloads ready, and return them.

    Parameters
    ----------
    tasks : sequence of str, str or None
        Task types, or `embedded.LANGUAGES`; None for all six task types.
    force : bool
        Rebuild even what is there and intact.
    progress : bool
        Show a progress line on the terminal.
    source : {"embedded", "hub"}
        Packages (no data hub needed), or the hub's data sets by name.

    Returns
    -------
    dict of str to DatasetDict
        Splits ``profile``, ``train``, ``test`` of each task.

    Raises
    ------
    DataError
        When a task or source is unknown, or its data cannot be fetched.
    """
    names = task_names(tasks, source)
    check_source(source)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Several processes may want the same data at once; all but the first find it ready.
    with _one_at_a_time(), Progress(*columns, disable=not progress) as bar:
        line = bar.add_task("checking the prepared prompts", total=None)
        stale = [task for task in names if force or not is_prepared(task, source)]
        if stale and source == "embedded":
            bar.update(line, description="fetching packages that carry task data (up to 360 MB, once)")
            embedded.extract([embedded.MEMBERS[task] for task in stale])
        for number, task in enumerate(stale, start=1):
            bar.update(line, description=f"preparing {task} ({number} of {len(stale)})")
            records = embedded.read(task) if source == "embedded" else hub.read(task, SEED)
            build(task, source, records)
        bar.update(line, description=f"{len(names)} tasks ready, {len(stale)} of them prepared now")
    return {task: _load(task, source) for task in names}


def build(task: str, source: str, records: Iterable[Record]) -> Path:
    """Turn records into a stored task, replacing an older copy, and return its folder."""
    origin = source_name(task, source)
    pairs = ((record, render(task_of(task), record)) for record in records)
    splits = choose(task, pairs)
    if empty := [name for name in SPLITS if not splits[name]]:
        raise DataError(f"task {task!r} from {origin} leaves the splits {', '.join(empty)} empty; too few items.")
    import datasets

    content = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(
                [
                    {
                        "id": item_id(task, prompt, record.reference),
                        "task": task_of(task),
                        "prompt": prompt,
                        "reference": record.reference,
                        "choices": list(record.choices),
                        "source": origin,
                    }
                    for record, prompt in splits[name]
                ],
                features=features(),
            )
            for name in SPLITS
        }
    )
    target = task_folder(task, source)
    with whole_folder(target) as scratch:
        with _silent_datasets():
            content.save_to_disk(str(scratch))
        manifest = {
            "format": FORMAT,
            "task": task,
            "source": origin,
            "recipe": recipe_hash(task, source),
            "items": {name: len(content[name]) for name in SPLITS},
            "sha256": {str(path.relative_to(scratch)): sha256_file(path) for path in _files(scratch)},
            "use": "evaluation and profiling of routing only; never fit language-model weights on these prompts",
        }
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    return target


def load_task(task: str, split: str, source: str = "embedded") -> datasets.Dataset:
    """Return one split of a prepared task, after checking its files against the manifest.

    Raises
    ------
    DataError
        When the task was not prepared, was prepared by another version, or its files were altered.
    """
    (name,) = task_names(task, source)
    check_source(source)
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; known are {', '.join(SPLITS)}.")
    return _load(name, source)[split]


def is_prepared(tasks: Sequence[str] | str | None = None, source: str = "embedded") -> bool:
    """Return whether the given tasks (None: all) are prepared, intact and up to date."""
    names = task_names(tasks, source)
    check_source(source)
    try:
        for task in names:
            _load(task, source)
    except DataError:
        return False
    return True


def data_hash(tasks: Sequence[str] | str | None = None, source: str = "embedded") -> str:
    """Return one hash of the prepared prompts of the given tasks, for records of runs and for profiles."""
    digest = hashlib.sha256()
    for task in task_names(tasks, source):
        for split in SPLITS:
            for item in load_task(task, split, source)["id"]:
                digest.update(f"{split}:{item}\n".encode())
    return digest.hexdigest()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    folder = cache_dir() / "workloads"
    folder.mkdir(exist_ok=True)
    with FileLock(str(folder / ".lock")):
        yield


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """Keep the many bars of ``save_to_disk`` off the terminal, where ours already tells the progress."""
    import datasets

    was_on = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _read_manifest(task: str, source: str) -> dict[str, Any]:
    folder = task_folder(task, source)
    again = "`emoe data prepare`" if source == "embedded" else f"`emoe data prepare --source {source}`"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        recipe = manifest["recipe"]
    except FileNotFoundError:
        raise DataError(
            f"the prompts of task {task!r} are not prepared; run {again}, or take the source 'fixture'."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged; run `emoe data prepare --force`.") from error
    if recipe != recipe_hash(task, source):
        raise DataError(f"the prompts of task {task!r} were prepared by another version; run {again}.")
    return manifest


def _load(task: str, source: str) -> datasets.DatasetDict:
    manifest = _read_manifest(task, source)
    folder = task_folder(task, source)
    found = {str(path.relative_to(folder)): sha256_file(path) for path in _files(folder)}
    if altered := sorted(set(found.items()) ^ set(manifest["sha256"].items())):
        raise DataError(
            f"the prompts of task {task!r} are damaged ({altered[0][0]} in {folder}); run `emoe data prepare --force`."
        )
    import datasets

    return datasets.load_from_disk(str(folder))
