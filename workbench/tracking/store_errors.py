"""What can be wrong with the store, told in one line with what to do about it.

MLflow, sqlite and the operating system say it in exceptions of their own, some of them over pages. Every call of the
store's client passes through here (`store_client`), and so does what writes files beside it, such as a report.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from emoe_core.errors import ExperimentError
from workbench.tracking.place import store_name

GO_ON = "and run the same command again; finished runs are kept."
BETWEEN_VERSIONS = (
    "Let an upgrade that still runs come to its end; of one that was interrupted, restore the copy of mlruns/mlflow.db "
    "that was made before."
)
FULL = re.compile(r"No space left on device|database or disk is full|Disk quota exceeded", re.IGNORECASE)
# What an error says, and what helps.
ADVICE = (
    (FULL, f"Make room {GO_ON}"),
    (
        re.compile(r"Read-only file system|attempt to write a readonly database|Permission denied"),
        "Make it writable for you, or write elsewhere (--out of a report; EMOE_HOME, the folder of the project).",
    ),
    (
        re.compile(r"database (table )?is locked"),
        f"Another process holds it (a backup, a database browser, `mlflow gc`): end that one {GO_ON}",
    ),
    (
        re.compile(r"disk image is malformed|file is not a database|disk I/O error"),
        "Restore mlruns/mlflow.db from a copy, or move the folder mlruns away to start a new store.",
    ),
    (re.compile(r"no such (table|column)|has no column|table \S+ already exists|duplicate column"), BETWEEN_VERSIONS),
    (re.compile(r"API request to"), f"See that the MLflow server runs and can be reached, {GO_ON}"),
)
DELETED = re.compile(
    r"The (?P<kind>run|experiment) (?P<id>\w+) must be in the 'active' state"
    r"|Run with id=(?P<run>\w+) not found|No Experiment with id=(?P<experiment>\w+) exists"
)


class StoreError(ExperimentError):
    """The store cannot be read or written."""


class DeletedError(ExperimentError):
    """A run or an experiment was deleted in MLflow while something was to be recorded with it."""


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turn what is wrong with the store, or with the disk under a file, into one line that says what to do.

    Raises
    ------
    StoreError
        When the store, or the file that was to be written, is full, read-only, locked, damaged, or does not answer.
    DeletedError
        When the run or its experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (OSError, MlflowException) as error:
        told = told_in_one_line(error)
        if told is None:
            raise
        raise told from error


def told_in_one_line(error: Exception) -> ExperimentError | None:
    """Return what an error says about the store, None when that is nothing known."""
    # What follows is the statement that failed, with values that may say anything.
    line = " ".join(str(error).partition("[SQL:")[0].split())
    if gone := DELETED.search(line):
        kind = gone["kind"] or ("run" if gone["run"] else "experiment")
        name = gone["id"] or gone["run"] or gone["experiment"]
        return DeletedError(f"the {kind} {name} was deleted in MLflow. Restore it there, or make it again.")
    for sign, advice in ADVICE:
        if sign.search(line):
            what = str(getattr(error, "strerror", None) or line.rpartition("Error) ")[2]).rstrip(".")
            where = getattr(error, "filename", None) or store_name()
            return StoreError(f"cannot use {where}: {what[0].lower()}{what[1:]}. {advice}")
    return None


def disk_reason(text: str) -> str | None:
    """Return what is wrong with the disk if an error text says that it is full, else None."""
    found = FULL.search(text)
    return None if found is None else found[0][0].lower() + found[0][1:]
