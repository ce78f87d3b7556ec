"""Where runs are kept: the store, its locks, and what goes wrong with its disk.

Terms: the *store* is ``mlruns/mlflow.db`` (sqlite) with ``mlruns/artifacts`` under the project root, or the MLflow
server that ``MLFLOW_TRACKING_URI`` names (http or https only; see `tracking_server`). Locks are files in
``mlruns/locks``; the system drops them when a process ends, however it ends. Writing a run is `tracking`'s matter,
reading runs back that of `results`.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

HOME_VARIABLE = "EMOE_HOME"
SERVER_VARIABLE = "MLFLOW_TRACKING_URI"
SERVER_PATIENCE_S = 10.0


def project_root() -> Path:
    """Return the folder that holds ``mlruns``.

    ``$EMOE_HOME`` when set, else the nearest folder with a ``pyproject.toml`` at or above the working directory, else
    the working directory.
    """
    chosen = os.environ.get(HOME_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file():
            return folder
    return here


def store_dir() -> Path:
    """Return the store's folder, made if missing."""
    folder = project_root() / "mlruns"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(
            f"cannot make {folder}: {error.strerror}. Set {HOME_VARIABLE} to a writable folder."
        ) from None
    return folder


def server_uri() -> str | None:
    """Return the address of the MLflow server that is to be used, None where the store is on this disk."""
    chosen = os.environ.get(SERVER_VARIABLE, "").rstrip("/")
    return chosen if chosen.startswith(("http://", "https://")) else None


def store_uri() -> str:
    """Return the address of the store, for MLflow and its user interface."""
    return server_uri() or f"sqlite:///{store_dir() / 'mlflow.db'}"


def store_name() -> str:
    """Return the store as messages call it: its server or its folder."""
    return server_uri() or str(store_dir())


def ui_command() -> str:
    """Return the shell command that opens the MLflow user interface on this store, as it can be pasted.

    Job execution is off: it starts a dozen idle worker processes that a local store has no use for. A server shows its
    runs itself.
    """
    if server := server_uri():
        return shlex.join(["open", server])
    beside = Path(sys.executable).with_name("mlflow")
    program = str(beside) if beside.exists() else "mlflow"
    words = [program, "ui", "--backend-store-uri", store_uri()]
    return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.join(words)}"


@contextlib.contextmanager
def locked(name: str, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file of the store; the system drops it when the process ends, however it ends.

    Yields whether the lock was obtained, which is always so when `wait`.
    """
    folder = store_dir() / "locks"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("a") as handle:
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
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    if server := server_uri():
        _ask_for_health(server)
        return MlflowClient(tracking_uri=server)
    with locked("schema"), disk_errors():
        client = MlflowClient(tracking_uri=store_uri())
        client.get_experiment_by_name("Default")
    return client


def _ask_for_health(server: str) -> None:
    """Refuse a server that does not answer at once; MLflow itself would try for minutes."""
    import requests

    try:
        requests.get(f"{server}/health", timeout=SERVER_PATIENCE_S).raise_for_status()
    except requests.RequestException as error:
        raise ExperimentError(
            f"the MLflow server {server} does not answer: {error}. Start it (`emoe tracking-server`), or unset "
            f"{SERVER_VARIABLE} to use the store on this disk."
        ) from None


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a full or read-only disk under the store into an `ExperimentError` that says what to do."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (OSError, MlflowException) as error:
        reason = disk_reason(str(error))
        if reason is None:
            raise
        raise ExperimentError(
            f"cannot write to {store_name()}: {reason}. Make room and run the same command again; "
            "finished runs are kept."
        ) from error


def disk_reason(text: str) -> str | None:
    """Return what is wrong with the disk if an error text speaks of it, else None."""
    for sign in ("No space left on device", "database or disk is full", "Disk quota exceeded", "Read-only file system"):
        if sign.lower() in text.lower():
            return sign[0].lower() + sign[1:]
    return None


def experiment_id(client: MlflowClient, name: str) -> str:
    """Return the id of an experiment, made if missing, with its artifacts beside the store."""
    known = client.get_experiment_by_name(name)
    if known is None:
        # The kind has the interface show a table of runs with metrics instead of its pages for chat traces.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        if server_uri():
            return str(client.create_experiment(name, tags=kind))  # the server keeps the artifacts
        place = store_dir() / "artifacts"
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
