"""The paper's figures beside ours: the closing tables of all notebooks in one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from workbench.tracking.record import RunRecord

TABLE = "beside_paper"
COLUMNS = ("what", "paper", "here", "why they differ")


def paper_rows(record: RunRecord, sweep: str) -> pd.DataFrame:
    """Return a run's closing table with where it comes from: sweep, notebook, run, model, stream; empty without one."""
    table = record.table(TABLE)
    if table is None or not set(COLUMNS) <= set(table.columns):
        return pd.DataFrame()
    origin = {
        "sweep": sweep,
        "notebook": record.notebook_name,
        "run_id": record.run_id,
        "run_name": record.name,
        "model": str(record.params.get("model", "?")),
        "prompts": record.params.get("n_prompts"),
        "source": record.params.get("source"),
    }
    return table[list(COLUMNS)].assign(**origin)
