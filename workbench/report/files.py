"""Files of the site that are there to be taken away: tables as CSV and JSON, and what each run recorded.

A run's artifacts lie in ``runs/ID`` as MLflow keeps them; a table (Parquet) has the same as CSV beside it. Names come
from notebooks and are quoted where they become addresses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pandas as pd

from emoe_core.errors import ExperimentError
from workbench.metrics.show import show_bytes
from workbench.tracking.store import finite
from workbench.tracking.store_errors import store_errors

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DATA = "data"
RUNS = "runs"
ID_LETTERS = 12


@dataclass(frozen=True)
class Download:
    """A file of the site: what it is, its address relative to the site's folder, its size as text."""

    name: str
    address: str
    size: str


def write_table(site: Path, name: str, table: pd.DataFrame, title: str) -> list[Download]:
    """Write a table as ``data/NAME.csv`` and ``data/NAME.json`` (a list of records; what does not exist is null)."""
    records = [finite(row) for row in table.astype(object).to_dict("records")]
    with store_errors():
        folder = site / DATA
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{name}.csv", index=False)
        text = json.dumps(records, indent=1, default=_plain, allow_nan=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return [_download(site, folder / f"{name}.{kind}", f"{title} ({kind.upper()})") for kind in ("csv", "json")]


def copy_artifacts(client: MlflowClient, run_id: str, site: Path) -> tuple[list[Download], list[Download]]:
    """Copy what a run recorded; return its files, and apart from them its figures (PNG).

    Raises
    ------
    ExperimentError
        When the store names an artifact that it does not give.
    """
    folder = site / RUNS / run_id[:ID_LETTERS]
    with store_errors():
        folder.mkdir(parents=True, exist_ok=True)
        for item in client.list_artifacts(run_id):
            try:
                client.download_artifacts(run_id, item.path, str(folder))
            except ExperimentError:
                raise
            except Exception as error:
                raise ExperimentError(
                    f"cannot read {item.path} of run {run_id}: {error}. Restore the store's artifacts, or delete that "
                    "run in the MLflow UI."
                ) from None
        for table in sorted(folder.rglob("*.parquet")):
            pd.read_parquet(table).to_csv(table.with_suffix(".csv"), index=False)
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    figures = [path for path in found if path.suffix == ".png"]
    names = {path: str(path.relative_to(folder)) for path in found}
    return (
        [_download(site, path, names[path]) for path in found if path not in figures],
        [_download(site, path, path.stem.replace("_", " ")) for path in figures],
    )


def address(path: str) -> str:
    """Return a path within the site as an address: a name may hold what addresses give a meaning to."""
    return quote(path)


def as_tables(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return frames below each other; an empty one has no columns to add."""
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def _download(site: Path, path: Path, name: str) -> Download:
    return Download(name, address(path.relative_to(site).as_posix()), show_bytes(path.stat().st_size))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
