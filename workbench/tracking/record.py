"""What one recorded run left behind: parameters, metrics, environment, tables and the notebook as it was executed."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from workbench.tracking.notebook import parse_notebook
from workbench.tracking.results import artifact_frame
from workbench.tracking.run import DATA_FOLDER, ENVIRONMENT_FILE, NOTEBOOK_FOLDER
from workbench.tracking.runs import NOTEBOOK_TAG
from workbench.tracking.store import decode, recorded_metrics

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class RunRecord:
    """A run of the store; artifacts are read when they are asked for, once.

    Attributes
    ----------
    params : dict
        Parameters with their types.
    metrics : dict of str to float
    tags : dict of str to str
    """

    client: MlflowClient = field(repr=False)
    run_id: str
    name: str
    status: str
    started_ms: int
    params: dict[str, Any]
    metrics: dict[str, float]
    tags: dict[str, str]

    @classmethod
    def of(cls, client: MlflowClient, run: MlflowRun) -> RunRecord:
        """Return the record of a run as MLflow gave it."""
        return cls(
            client,
            run.info.run_id,
            run.info.run_name or run.info.run_id,
            run.info.status,
            run.info.start_time,
            {name: decode(text) for name, text in run.data.params.items()},
            recorded_metrics(run),
            dict(run.data.tags),
        )

    @property
    def notebook_name(self) -> str:
        """The notebook's file name without extension; empty for a run that no sweep made."""
        return self.tags.get(NOTEBOOK_TAG, "")

    def describe(self) -> str:
        """Return the run in a few words for people."""
        when = datetime.fromtimestamp(self.started_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return f"{self.name} ({self.run_id[:8]}, {when})"

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What the run ran on (`Environment.to_dict`); empty when it was not recorded."""
        text = self.text(ENVIRONMENT_FILE)
        if text is None:
            return {}
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise ExperimentError(
                f"{ENVIRONMENT_FILE} of run {self.run_id} is damaged ({error}): restore the store's artifacts from a "
                "copy, or make the run again."
            ) from None

    def text(self, name: str) -> str | None:
        """Return a text file that the run recorded, None when it has none of that name."""
        return self._read(name) if name in self._artifacts("") else None

    @cached_property
    def table_names(self) -> list[str]:
        """Names of the tables that the run recorded."""
        return [Path(path).stem for path in self._artifacts(DATA_FOLDER) if path.endswith(".parquet")]

    def table(self, name: str) -> pd.DataFrame | None:
        """Return a recorded table, None when the run has none of that name."""
        return artifact_frame(self.run_id, name) if name in self.table_names else None

    @cached_property
    def notebook(self) -> dict[str, Any] | None:
        """The notebook as it was executed, None when none was kept."""
        path = next((path for path in self._artifacts(NOTEBOOK_FOLDER) if path.endswith(".ipynb")), None)
        if path is None:
            return None
        return parse_notebook(self._read(path), f"{path} of run {self.run_id}")

    def _artifacts(self, folder: str) -> list[str]:
        return [item.path for item in self.client.list_artifacts(self.run_id, folder or None)]

    def _read(self, path: str) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                return Path(self.client.download_artifacts(self.run_id, path, scratch)).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ExperimentError(f"cannot read {path} of run {self.run_id}: {error}") from None
