"""Write a run to MLflow from a notebook.

Terms: a *run* is one execution of one notebook. Inside a sweep the run already exists (the sweep made it and names it
in ``EMOE_RUN_ID``) and the sweep decides its final status; opened by hand, a notebook makes a run of its own. ::

    with tracking.run("memory", f"budget {budget}", params={"budget": budget, "seed": seed}) as run:
        run.log_metrics({"peak_bytes": 4.1e8, "perplexity_ratio": 1.02})
        run.log_frame("requests", frame)
        run.log_figure("hits", figure)

Metric names end with their unit (``peak_bytes``, ``tpot_s``). Everything here goes through `MlflowClient`: there is no
active run, no global state, and two runs in one process do not disturb each other. This module draws nothing and does
not decide what is worth logging.
"""

from __future__ import annotations

import contextlib
import json
import numbers
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from workbench.machine.environment import Environment, describe_environment, installed_packages
from workbench.tracking.store import encode, experiment_id, open_store
from workbench.tracking.store_errors import store_errors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from mlflow.tracking import MlflowClient

    from workbench.tracking.traces import Span

RUN_VARIABLE = "EMOE_RUN_ID"
PARENT_TAG = "mlflow.parentRunId"
EXPERIMENT_TAG = "emoe.experiment"
FIGURE_FOLDER = "figures"
DATA_FOLDER = "data"
NOTEBOOK_FOLDER = "notebook"
ENVIRONMENT_FILE = "environment.json"
LOCK_FILE = "requirements.txt"


class Run:
    """A run being written.

    Attributes
    ----------
    run_id : str
        MLflow's id of the run.
    environment : Environment
        What was recorded as ``environment.json``.
    """

    def __init__(self, client: MlflowClient, run_id: str, environment: Environment) -> None:
        self._client = client
        self.run_id = run_id
        self.environment = environment
        self.log_text(ENVIRONMENT_FILE, json.dumps(environment.to_dict(), indent=2))
        self.log_tags(environment.tags())
        self.log_text(LOCK_FILE, "".join(f"{line}\n" for line in installed_packages()))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; a parameter is written once and keeps its first value."""
        known = self._client.get_run(self.run_id).data.params
        from mlflow.entities import Param

        fresh = [Param(name, encode(value)) for name, value in params.items() if name not in known]
        self._client.log_batch(self.run_id, params=fresh)

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Record metrics, names with units; entries that are None are left out.

        Raises
        ------
        ExperimentError
            When a value is not a number.
        """
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        rows = []
        for name, value in metrics.items():
            if value is None:
                continue
            if not isinstance(value, numbers.Real) and not hasattr(value, "item"):
                raise ExperimentError(
                    f"metric {name!r} is {value!r}: a metric is one number; log tables with log_frame."
                )
            rows.append(Metric(name, float(value), now_ms, step))
        self._client.log_batch(self.run_id, metrics=rows)

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Record tags."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def log_frame(self, name: str, frame: pd.DataFrame) -> None:
        """Record a table as ``data/NAME.parquet``."""
        self._log_file(f"{name}.parquet", DATA_FOLDER, frame.to_parquet)

    def log_figure(self, name: str, figure: Figure) -> Figure:
        """Record a figure as ``figures/NAME.png`` and return it, so that a cell can end with this call."""
        self._log_file(f"{name}.png", FIGURE_FOLDER, lambda path: figure.savefig(path, dpi=120, bbox_inches="tight"))
        return figure

    def log_text(self, name: str, text: str) -> None:
        """Record a text file under the given name."""
        self._client.log_text(self.run_id, text, name)

    def log_traces(self, roots: Sequence[Span]) -> list[str]:
        """Record traces of requests (`request_spans`) beside the run and return their ids."""
        from workbench.tracking.trace_log import log_traces

        return log_traces(self._client, self.run_id, roots)

    def _log_file(self, name: str, folder: str, write: Callable[[Path], object]) -> None:
        with tempfile.TemporaryDirectory() as scratch, store_errors():
            path = Path(scratch) / name
            write(path)
            self._client.log_artifact(self.run_id, str(path), folder)


@contextlib.contextmanager
def run(
    experiment: str,
    name: str,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    **identity: Any,
) -> Iterator[Run]:
    """Open the run of a notebook.

    Within a sweep this continues the run that the sweep made; otherwise a new run is made in `experiment`, and ends as
    FINISHED, FAILED (an exception) or KILLED (an interrupt).

    Parameters
    ----------
    experiment, name : str
        Where the run is filed, and what it is called, when the notebook is run by hand.
    params, tags : mapping, optional
        Recorded with the run.
    **identity
        What is run (fields `IDENTITY` of the environment), kept in ``environment.json``; see `Run.identify` for later
        additions. `seed` and `dtype` default to the parameters of those names.
    """
    given = dict(params or {})
    own: dict[str, Any] = {name: given[name] for name in ("seed", "dtype") if name in given}
    environment = describe_environment(**{**own, **identity})
    client = open_store()
    swept = os.environ.get(RUN_VARIABLE)
    run_id = swept or new_run(client, experiment, name)
    record = Run(client, run_id, environment)
    record.log_tags({EXPERIMENT_TAG: experiment, **(tags or {})})
    record.log_params(given)
    try:
        yield record
    except BaseException as error:
        if not swept:
            with contextlib.suppress(ExperimentError):  # what went wrong first is what is told
                client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    if not swept:
        client.set_terminated(run_id, "FINISHED")


def new_run(
    client: MlflowClient,
    experiment: str,
    name: str,
    *,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    started_ms: int | None = None,
) -> str:
    """Make a run and return its id; with `parent`, MLflow's interface shows it nested under that run.

    ``started_ms`` is when it began, since 1970; now if not given.
    """
    every = dict(tags or {})
    if parent is not None:
        every[PARENT_TAG] = parent
    every.setdefault("mlflow.source.type", "NOTEBOOK")
    created = client.create_run(experiment_id(client, experiment), started_ms, every, name)
    return str(created.info.run_id)
