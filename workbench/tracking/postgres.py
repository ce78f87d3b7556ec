"""A PostgreSQL cluster in a folder of its own, for as long as it is needed.

It listens on a Unix socket that only its owner may use, on no network. PostgreSQL refuses to run as root: there it runs
as the system's user ``postgres``, whom Debian's package makes. What the database holds stays in the folder.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from emoe_core.errors import OptionError

DEBIAN_FOLDER = Path("/usr/lib/postgresql")
USER = "postgres"
PROGRAMS = ("initdb", "pg_ctl", "createdb")


def find_programs() -> Path:
    """Return the folder of PostgreSQL's programs: of the newest version that Debian keeps, else of the path.

    Raises
    ------
    OptionError
        When PostgreSQL is not installed.
    """
    versions = sorted(DEBIAN_FOLDER.glob("*/bin"), key=lambda place: float(place.parent.name), reverse=True)
    named = shutil.which("initdb")
    for folder in [*versions, *([Path(named).parent] if named else [])]:
        if all((folder / name).is_file() for name in PROGRAMS):
            return folder
    raise OptionError("PostgreSQL is not installed: apt install postgresql, or name a database with --database.")


class Postgres:
    """A cluster that runs.

    Attributes
    ----------
    socket : Path
        Folder of its socket.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder, self._programs = folder, programs
        self._account = pwd.getpwnam(USER) if os.geteuid() == 0 else None
        # Sockets have short names, so it does not lie in the folder.
        self.socket = Path(tempfile.mkdtemp(prefix="emoe-pg-"))
        if self._account:
            os.chown(self.socket, self._account.pw_uid, self._account.pw_gid)

    def start(self) -> None:
        """Make the cluster if there is none, and start it; one that a killed process left running is stopped first.

        Raises
        ------
        OptionError
            When it does not start; with PostgreSQL's own words.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._account:
            os.chown(self._folder, self._account.pw_uid, self._account.pw_gid)
        if not (self._folder / "PG_VERSION").is_file():
            self._run("initdb", "-D", self._folder, "-U", USER, "--auth=trust", "--encoding=UTF8", "--locale=C")
        with contextlib.suppress(OptionError):
            self._run("pg_ctl", "-D", self._folder, "stop", "-m", "fast")
        settings = f"-c listen_addresses='' -c unix_socket_directories='{self.socket}' -c unix_socket_permissions=0700"
        self._run("pg_ctl", "-D", self._folder, "-w", "-l", self._folder / "server.log", "-o", settings, "start")

    def stop(self) -> None:
        """Stop the cluster; open connections are ended, what was committed is kept."""
        with contextlib.suppress(OptionError):
            self._run("pg_ctl", "-D", self._folder, "-w", "stop", "-m", "fast")
        shutil.rmtree(self.socket, ignore_errors=True)

    def database(self, name: str) -> str:
        """Return the address of a database, made if missing, as SQLAlchemy takes it."""
        try:
            self._run("createdb", "-h", self.socket, "-U", USER, name)
        except OptionError as error:
            if "already exists" not in str(error):
                raise
        return f"postgresql+psycopg2://{USER}@/{name}?host={quote(str(self.socket), safe='')}"

    def _run(self, program: str, *arguments: str | Path) -> None:
        command: Sequence[str] = [str(self._programs / program), *map(str, arguments)]
        # A file and not a pipe: the server that pg_ctl starts keeps its output open.
        with tempfile.TemporaryFile() as said:
            code = subprocess.call(
                command,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                user=self._account and self._account.pw_uid,
                group=self._account and self._account.pw_gid,
                extra_groups=[] if self._account else None,
            )
            said.seek(0)
            words = said.read().decode(errors="replace").strip()
        if code:
            hint = f" ({USER} must be able to reach the folder)" if "ermission denied" in words else ""
            raise OptionError(f"PostgreSQL's {program} failed in {self._folder}{hint}: {words}")


@contextlib.contextmanager
def running_postgres(folder: Path) -> Iterator[Postgres]:
    """Run the cluster of a folder meanwhile."""
    cluster = Postgres(folder, find_programs())
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
