"""Where runs are kept: the project's folder or a server, by what the environment says.

The *store* is ``mlruns/mlflow.db`` (sqlite) with ``mlruns/artifacts`` under the project root, or the MLflow server that
``MLFLOW_TRACKING_URI`` names (http or https only; see `server`).
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

from emoe_core.errors import ExperimentError

HOME_VARIABLE = "EMOE_HOME"
SERVER_VARIABLE = "MLFLOW_TRACKING_URI"


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


def database_file() -> Path:
    """Return the database of a store on this disk."""
    return store_dir() / "mlflow.db"


def server_uri() -> str | None:
    """Return the address of the MLflow server that is to be used, None where the store is on this disk.

    Raises
    ------
    ExperimentError
        When another kind of store is named, which would be left without a word.
    """
    chosen = os.environ.get(SERVER_VARIABLE, "").rstrip("/")
    if chosen.startswith(("http://", "https://")):
        return chosen
    named = unquote(chosen.partition(":///")[2])
    if chosen and Path(named).resolve() != database_file().resolve():
        raise ExperimentError(
            f"{SERVER_VARIABLE}={chosen} is no MLflow server (http:// or https://). Unset it to use the store in "
            f"{store_dir()}; another folder's is used with {HOME_VARIABLE}."
        )
    return None


def store_uri() -> str:
    """Return the address of the store, for MLflow and its user interface."""
    server = server_uri()
    if server:
        return server
    file = str(database_file())
    if "?" not in file and unquote(file) == file:
        return f"sqlite:///{file}"
    from sqlalchemy import URL

    # With its driver named: of an address without, MLflow makes folders as it stands, quoted.
    return URL.create("sqlite+pysqlite", database=file).render_as_string()


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
