"""Opening the store of runs, and its locks.

Where the store is says `place`. Locks are files in ``mlruns/locks``; the system drops them when a process ends, however
it ends. Writing a run is the matter of `run`, reading runs back that of `results`, what can be wrong with a store that
of `store_errors` and `store_file`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from workbench.tracking.place import SERVER_VARIABLE, database_file, server_uri, store_dir, store_uri
from workbench.tracking.store_errors import StoreError, store_errors, told_in_one_line
from workbench.tracking.store_file import ARTIFACTS, refuse_unusable, relocate

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

SERVER_PATIENCE_S = 10.0


@contextlib.contextmanager
def locked(name: str, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file of the store; the system drops it when the process ends, however it ends.

    Yields whether the lock was obtained, which is always so when `wait`.
    """
    folder = store_dir() / "locks"
    with contextlib.ExitStack() as stack:
        with store_errors():
            folder.mkdir(exist_ok=True)
            handle = stack.enter_context((folder / f"{name}.lock").open("a"))
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(handle, mode)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def machine_held(alone: bool, tell: Callable[[str], object]) -> Iterator[None]:
    """Hold this machine meanwhile, for a run that measures time ``alone``, else beside others that do not.

    ``tell`` is called with a sentence when that means waiting.
    """
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(locked("machine", shared=not alone, wait=False)):
            tell("Waiting for another sweep that measures time on this machine.")
            stack.enter_context(locked("machine", shared=not alone))
        yield


def open_store() -> MlflowClient:
    """Return a client of the store, created on first use.

    The first use writes the schema, which takes seconds and breaks when two processes do it at once; hence the lock.
    A store that this user may only read is read without.

    Raises
    ------
    StoreError
        When it cannot be opened: one line that says why, and what to do.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow logs the traceback of an error of the database before it raises it.
    for noisy, level in (("alembic", logging.WARNING), ("mlflow.store.db.utils", logging.CRITICAL)):
        logging.getLogger(noisy).setLevel(level)
    from workbench.tracking.client import StoreClient

    if server := server_uri():
        _ask_for_health(server)
        return StoreClient(server)
    folder, file = store_dir(), database_file()
    with contextlib.ExitStack() as stack:
        if os.access(folder, os.W_OK):
            stack.enter_context(locked("schema"))
        refuse_unusable(file)
        try:
            client = StoreClient(store_uri(), folder)
            client.get_experiment_by_name("Default")
        except StoreError:
            raise
        except Exception as error:
            # Whatever MLflow, its database layer or its migrations raise: the store is what they could not open.
            raise told_in_one_line(error) or StoreError(
                f"MLflow cannot open {file}: {' '.join(str(error).split()).partition('. ')[0]}. If an older MLflow "
                f"wrote it, make a copy of that file, then run: mlflow db upgrade {store_uri()}"
            ) from error
        relocate(file, folder)
    return client


def _ask_for_health(server: str) -> None:
    """Refuse a server that does not answer at once; MLflow itself would try for minutes."""
    import requests

    try:
        requests.get(f"{server}/health", timeout=SERVER_PATIENCE_S).raise_for_status()
    except requests.RequestException as error:
        raise ExperimentError(
            f"the MLflow server {server} does not answer: {error}. Start it (`mlflow server`), or unset "
            f"{SERVER_VARIABLE} to use the store on this disk."
        ) from None


def experiment_id(client: MlflowClient, name: str) -> str:
    """Return the id of an experiment, made if missing, with its artifacts beside the store."""
    known = client.get_experiment_by_name(name)
    if known is None:
        # The kind has the interface show a table of runs with metrics instead of its pages for chat traces.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        if server_uri():
            return str(client.create_experiment(name, tags=kind))  # the server keeps the artifacts
        place = store_dir() / ARTIFACTS
        with store_errors():
            place.mkdir(exist_ok=True)
        return str(client.create_experiment(name, artifact_location=(place / slug(name)).as_uri(), tags=kind))
    if known.lifecycle_stage != "active":
        raise ExperimentError(
            f"the MLflow experiment {name!r} was deleted. Restore it in the MLflow UI, or remove it for good with "
            f"`mlflow gc --backend-store-uri {'ITS_DATABASE' if server_uri() else shlex.quote(store_uri())}`."
        )
    return str(known.experiment_id)


def slug(text: str) -> str:
    """Return a text usable as a file name, in no other folder than the one it is put in."""
    name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)
    return "_" * max(len(name), 1) if name in ("", ".", "..") else name


def encode(value: Any) -> str:
    """Return a parameter as text that `decode` reads back with its type; plain words stay plain words."""
    if isinstance(value, str):
        return value if decode(value) == value else json.dumps(value)
    return json.dumps(value, default=str)


def recorded_metrics(run: MlflowRun) -> dict[str, float]:
    """Return a run's metrics as they were logged: for an infinite one MLflow's database keeps the largest number."""
    largest = sys.float_info.max
    return {
        name: math.copysign(math.inf, value) if abs(value) >= largest else value
        for name, value in run.data.metrics.items()
    }


def finite(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields as JSON has them: numbers that do not exist are null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }


def decode(text: str) -> Any:
    """Return the value that `encode` wrote."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value
