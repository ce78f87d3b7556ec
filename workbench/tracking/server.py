"""An MLflow server for sweeps whose runs do not share a disk, or that are more than sqlite can write at once.

It keeps runs in PostgreSQL and hands artifacts through (``mlflow-artifacts:``), so that a client needs its address
only. The database is one that this process starts in the server's folder (`postgres`), or any that SQLAlchemy knows. It
has no accounts: whoever reaches it may write, hence it listens on loopback unless told otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emoe_core.errors import ExperimentError, OptionError
from workbench.tracking.postgres import running_postgres

DATABASE = "mlflow"
START_PATIENCE_S = 180.0
STOP_PATIENCE_S = 15.0
POLL_S = 0.3


@dataclass(frozen=True)
class ServerConfig:
    """Where and how the server runs.

    Attributes
    ----------
    folder : Path
        Holds ``postgres/``, ``artifacts/`` and ``server.log``.
    database : str, optional
        SQLAlchemy address of a database to use instead of starting one.
    allowed_hosts : str, optional
        Names, comma-separated, by which clients may call it; MLflow refuses others. Loopback and private addresses are
        allowed when missing.
    workers : int
        Processes that answer.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 5000
    database: str | None = None
    allowed_hosts: str | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise OptionError(f"--port {self.port}: give 1 to 65535.")
        if self.workers < 1:
            raise OptionError(f"--workers {self.workers}: give 1 or more.")

    @property
    def address(self) -> str:
        """Return the address for clients on this machine."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"


@contextlib.contextmanager
def serving(config: ServerConfig) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server meanwhile; yields its process once it answers.

    Raises
    ------
    OptionError
        When PostgreSQL or its driver is missing, or the folder is in use.
    ExperimentError
        When the server does not start.
    """
    folder = config.folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_one(folder))
        database = config.database
        if database is None:
            require_driver()
            database = stack.enter_context(running_postgres(folder / "postgres")).database(DATABASE)
        log = stack.enter_context((folder / "server.log").open("ab"))
        process = subprocess.Popen(
            command(config, folder, database),
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches it through this process only, and the database ends after it
        )
        stack.callback(end, process)
        wait_until_it_answers(process, config.address, folder / "server.log")
        yield process


def command(config: ServerConfig, folder: Path, database: str) -> list[str]:
    """Return the command line of the MLflow server."""
    line = [sys.executable, "-m", "mlflow", "server", "--host", config.host, "--port", str(config.port)]
    line += ["--backend-store-uri", database, "--serve-artifacts", "--workers", str(config.workers)]
    line += ["--artifacts-destination", (folder / "artifacts").as_uri()]
    return line + (["--allowed-hosts", config.allowed_hosts] if config.allowed_hosts else [])


def require_driver() -> None:
    """Refuse to go on without PostgreSQL's driver."""
    try:
        import psycopg2  # noqa: F401
    except ImportError:
        raise OptionError("PostgreSQL needs its driver: pip install -c constraints.txt -e '.[postgres]'") from None


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder for one server."""
    with (folder / "server.lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(f"a server already runs in {folder}: use it, or name another --folder.") from None
        yield


def wait_until_it_answers(
    process: subprocess.Popen[bytes], address: str, log: Path, clock: Callable[[], float] = time.monotonic
) -> None:
    """Return once the server answers; refuse one that ended or never does, with the end of its log."""
    import requests

    deadline = clock() + START_PATIENCE_S
    while clock() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{address}/health", timeout=1).ok:
                return
        time.sleep(POLL_S)
    last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
    raise ExperimentError(f"the MLflow server at {address} did not start; the end of {log}:\n{last}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, and insist after a while."""
    process.terminate()
    try:
        process.wait(STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
