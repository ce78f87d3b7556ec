"""Read runs back from MLflow as tables.

Notebooks that compare runs and the report both start here. Rows are the *current* runs of a sweep (see `sweep_state`):
of a run that was done again only the last one counts; or all runs of an experiment.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from workbench.tracking.place import store_name
from workbench.tracking.run import DATA_FOLDER
from workbench.tracking.runs import current_runs, find_parent, search
from workbench.tracking.store import decode, open_store, recorded_metrics

if TYPE_CHECKING:
    import pandas as pd


def runs_frame(sweep: str | None = None, *, notebook: str | None = None) -> pd.DataFrame:
    """Return the current runs of a sweep, one row each.

    Parameters
    ----------
    sweep : str, optional
        Name of the sweep; the one that ran last when missing.
    notebook : str, optional
        Keep only runs of this notebook (its file name without extension).

    Returns
    -------
    DataFrame
        Columns ``run_id, run_name, notebook, status, error, duration_s``, then one per parameter (typed) and one per
        metric, by plain name. A metric that is called like a parameter gets the prefix ``measured_``.

    Raises
    ------
    ExperimentError
        When the store has no such sweep.
    """
    client = open_store()
    parent = find_parent(client, sweep)
    if parent is None:
        raise ExperimentError(
            f"the store at {store_name()} has no sweep{f' named {sweep!r}' if sweep else ''}. "
            "Run `emoe sweep FILE` first."
        )
    return frame_of(current_runs(client, parent), notebook=notebook)


def experiment_frame(experiment: str) -> pd.DataFrame:
    """Return the runs of an experiment, newest first: those of notebooks that were run by hand. See `runs_frame`.

    Raises
    ------
    ExperimentError
        When the store has no such experiment.
    """
    client = open_store()
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ExperimentError(f"the store at {store_name()} has no experiment {experiment!r}: run its notebook first.")
    return frame_of(search(client, "", [found.experiment_id]))


def frame_of(runs: list[Any], *, notebook: str | None = None) -> pd.DataFrame:
    """Return MLflow runs as a table; see `runs_frame` for its columns."""
    import pandas as pd

    rows = []
    for item in runs:
        tags = item.data.tags
        if notebook is not None and tags.get("emoe.notebook") != notebook:
            continue
        params = {name: decode(text) for name, text in item.data.params.items()}
        ended_ms = item.info.end_time
        row = {
            "run_id": item.info.run_id,
            "run_name": item.info.run_name,
            "notebook": tags.get("emoe.notebook"),
            "status": item.info.status,
            "error": tags.get("emoe.error"),
            "duration_s": (ended_ms - item.info.start_time) / 1000 if ended_ms else None,
        }
        known = sorted(recorded_metrics(item).items())
        metrics = {name if name not in params else f"measured_{name}": value for name, value in known}
        rows.append(row | params | metrics)
    return pd.DataFrame(rows)


def artifact_frame(run_id: str, name: str) -> pd.DataFrame:
    """Return the table that `Run.log_frame` recorded under `name`."""
    import pandas as pd

    client = open_store()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = client.download_artifacts(run_id, f"{DATA_FOLDER}/{name}.parquet", scratch)
        except ExperimentError:
            raise
        except Exception as error:
            raise ExperimentError(f"run {run_id} has no table {name!r}: {error}") from None
        return pd.read_parquet(path)
