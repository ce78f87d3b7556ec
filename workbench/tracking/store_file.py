"""The database of a store on this disk, before MLflow opens it: whether it can be, and where its artifacts lie now.

Left alone, MLflow tries for minutes to open a file that it cannot read, makes tables in one that a newer MLflow wrote,
and goes to where artifacts lay when they were recorded: it keeps absolute locations. Sqlite alone is used here.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from workbench.tracking.store_errors import BETWEEN_VERSIONS, StoreError, told_in_one_line

LOCK_PATIENCE_S = 10.0
ARTIFACTS = "artifacts"
# Where MLflow keeps locations: table and column.
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("trace_tags", "value"),
)


def refuse_unusable(file: Path) -> None:
    """Refuse a database that MLflow cannot open, or should not.

    Raises
    ------
    StoreError
        When it is no file, cannot be read or made, is locked or damaged, was written by a newer MLflow, or is halfway
        through an upgrade.
    """
    if not file.exists():
        if not os.access(file.parent, os.W_OK):
            raise StoreError(f"{file.parent} holds no store and cannot be written: set EMOE_HOME to a folder that can.")
        return
    if not file.is_file():
        raise StoreError(f"{file} is no file, so it cannot be the store's database: move it away.")
    try:
        with opened(file, LOCK_PATIENCE_S) as connection:
            tables = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            rows = connection.execute("SELECT version_num FROM alembic_version") if "alembic_version" in tables else ()
            revision = next((str(version) for (version,) in rows), None)
    except sqlite3.Error as error:
        raise told_in_one_line(error) or StoreError(
            f"cannot use {file}: {error}. See to its permissions, or restore it from a copy."
        ) from None
    if any(name.startswith("_alembic_tmp_") for name in tables):
        raise StoreError(f"cannot use {file}: an upgrade of its schema has begun and not ended. {BETWEEN_VERSIONS}")
    if revision is not None and not is_known(revision):
        import mlflow

        raise StoreError(
            f"{file} was written by a newer MLflow (schema {revision}; this is MLflow {mlflow.__version__}). Install "
            "the MLflow that wrote it, or set EMOE_HOME to another folder to start a new store."
        )


def is_known(revision: str) -> bool:
    """Say whether this MLflow has a version of its schema of that name."""
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations"
    if any((migrations / "versions").glob(f"{revision}_*.py")):
        return True  # as they are all called: to read them takes a second
    try:
        return ScriptDirectory(str(migrations)).get_revision(revision) is not None
    except CommandError:
        return False


def location_here(recorded: str, folder: Path) -> str:
    """Return where artifacts lie that were recorded in the store which lies in `folder` now.

    Parameters
    ----------
    recorded : str
        A path or an address. What is not of a store's own artifacts, such as a bucket's, is returned as it is.
    folder : Path
        The store's folder (``mlruns``).
    """
    before, below = _split(recorded, folder.name)
    return recorded if before is None else f"{_now(before, folder)}{below}"


def relocate(file: Path, folder: Path) -> None:
    """Have MLflow's own pages find artifacts in `folder` too; a database that cannot be written stays as it is.

    The workbench itself does not depend on that, see `location_here`.
    """
    with contextlib.suppress(sqlite3.Error), opened(file, 0.0) as connection, connection:
        recorded = [str(place) for (place,) in connection.execute("SELECT artifact_location FROM experiments")]
        for before in {_split(place, folder.name)[0] for place in recorded} - {None}:
            now = _now(str(before), folder)
            for table, column in LOCATIONS if now != before else ():
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (now, len(str(before)) + 1, len(str(before)), before),
                )


@contextlib.contextmanager
def opened(file: Path, patience_s: float) -> Iterator[sqlite3.Connection]:
    """Open a database that exists, for reading only where it cannot be written."""
    with contextlib.closing(
        sqlite3.connect(f"file:{quote(str(file))}?mode=rw", timeout=patience_s, uri=True)
    ) as connection:
        yield connection


def _split(recorded: str, folder: str) -> tuple[str | None, str]:
    """Return a location up to and with the folder of artifacts, None where it is in no such folder, and the rest."""
    parting = f"/{folder}/{ARTIFACTS}/"
    before, found, below = recorded.rpartition(parting)
    local = recorded.startswith(("/", "file:"))
    return (before + parting, below) if found and local else (None, recorded)


def _now(before: str, folder: Path) -> str:
    here = folder / ARTIFACTS
    return f"{here.as_uri() if before.startswith('file:') else here}/"
