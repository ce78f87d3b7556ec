"""An MLflow server on PostgreSQL for a test, as docs/how-to/write-a-sweep.md starts one."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import requests

# PostgreSQL refuses to run as root; Debian's package makes this user for it, and keeps programs off the path.
USER = "postgres"
DEBIAN_PROGRAMS = "/usr/lib/postgresql/*/bin"
PATIENCE_S = 180.0


@dataclass(frozen=True)
class TrackingServer:
    """A server that runs: its address, the database below it (as SQLAlchemy takes it), and where artifacts lie."""

    address: str
    database: str
    artifacts: Path


@contextlib.contextmanager
def tracking_server() -> Iterator[TrackingServer]:
    """Run a server meanwhile, with a database of its own; skips where PostgreSQL is not installed."""
    pytest.importorskip("psycopg2", reason="the driver of PostgreSQL is not installed (extra `postgres`)")
    # The user `postgres` must reach it, and pytest's own folders are private.
    with tempfile.TemporaryDirectory(prefix="emoe-") as made, contextlib.ExitStack() as stack:
        folder, port = Path(made), free_port()
        folder.chmod(0o755)
        database = stack.enter_context(_postgres(folder / "database"))
        log = stack.enter_context((folder / "server.log").open("w+"))
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--backend-store-uri", database]
        command += ["--serve-artifacts", "--artifacts-destination", (folder / "artifacts").as_uri(), "--workers", "1"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        address = f"http://127.0.0.1:{port}"
        _wait_for(process, address, folder / "server.log")
        yield TrackingServer(address, database, folder / "artifacts")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    """Run a cluster that listens on a socket in its folder only; yields the address of its database."""
    found = sorted(Path("/").glob(DEBIAN_PROGRAMS.lstrip("/"))) or [Path(shutil.which("initdb") or "none").parent]
    if not (found[-1] / "initdb").exists():
        pytest.skip("PostgreSQL is not installed")
    folder.mkdir()
    account = pwd.getpwnam(USER) if os.geteuid() == 0 else None
    if account:
        os.chown(folder, account.pw_uid, account.pw_gid)

    def call(program: str, *arguments: str) -> None:
        owner = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([str(found[-1] / program), *arguments], cwd="/", check=True, **owner, **quiet)

    data = str(folder / "data")
    call("initdb", "-D", data, "-U", USER, "--auth=trust", "--encoding=UTF8", "--locale=C")
    settings = f"-c listen_addresses='' -c unix_socket_directories='{folder}'"
    call("pg_ctl", "-D", data, "-w", "-l", str(folder / "postgres.log"), "-o", settings, "start")
    try:
        call("createdb", "-h", str(folder), "-U", USER, "mlflow")
        yield f"postgresql+psycopg2://{USER}@/mlflow?host={quote(str(folder), safe='')}"
    finally:
        call("pg_ctl", "-D", data, "-w", "stop", "-m", "fast")


def _wait_for(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{address}/health", timeout=1).ok:
                return
        time.sleep(0.3)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-2000:]}")
