"""A run written to files, for machines without MLflow: `workbench.results.taking` makes an ordinary run of it.

A folder a run. ``run.json`` is the run as MLflow's REST interface answers ``runs/get`` (``info`` and ``data``, with
names and values in lists). Beside it, in ``artifacts``, lies what the run's artifacts are to be, tables as JSON. The
run's file is written last, so a folder without one was not finished.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from emoe_core.files import write_whole
from workbench.machine.environment import Environment, installed_packages
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.run import DATA_FOLDER, ENVIRONMENT_FILE, LOCK_FILE
from workbench.tracking.store import encode

if TYPE_CHECKING:
    import pandas as pd

RUN_FILE, ARTIFACT_FOLDER = "run.json", "artifacts"


class RunFile:
    """A run being written; the methods are those of `workbench.tracking.run.Run`.

    Parameters
    ----------
    folder : Path
        Made if missing; what a run before left there is replaced.
    name : str
    tags : mapping of str to str
    environment : Environment
    """

    def __init__(self, folder: Path, name: str, tags: Mapping[str, str], environment: Environment) -> None:
        self.folder = folder
        (folder / RUN_FILE).unlink(missing_ok=True)
        (folder / ARTIFACT_FOLDER).mkdir(parents=True, exist_ok=True)
        self._info: dict[str, Any] = {"run_name": name, "status": "RUNNING", "start_time": _now_ms()}
        self._data: dict[str, dict[str, Any]] = {"params": {}, "metrics": {}, "tags": {}}
        self.log_environment(environment)
        self.log_text(LOCK_FILE, "".join(f"{line}\n" for line in installed_packages()))
        self.log_tags(tags)

    def log_environment(self, environment: Environment) -> None:
        """Record what the run runs on, and what it runs once that is known."""
        self.log_text(ENVIRONMENT_FILE, json.dumps(environment.to_dict(), indent=2))
        self.log_tags(environment.tags())

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters."""
        self._data["params"] |= {name: encode(value) for name, value in params.items()}

    def log_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Record metrics; entries that are None or no number are left out."""
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        self._data["metrics"] |= {name: value for name, value in known.items() if math.isfinite(value)}

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Record tags."""
        self._data["tags"] |= {name: str(value) for name, value in tags.items()}

    def log_frame(self, name: str, frame: pd.DataFrame) -> None:
        """Record a table."""
        self.log_text(f"{DATA_FOLDER}/{name}.json", frame.to_json(orient="records"))

    def log_text(self, name: str, text: str) -> None:
        """Record a text file under the given name."""
        file = self.folder / ARTIFACT_FOLDER / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def end(self, status: str) -> None:
        """Write the run: "FINISHED", "FAILED" or "KILLED"."""
        ended = _now_ms()
        data: dict[str, Any] = {
            kind: [{"key": key, "value": value} for key, value in values.items()] for kind, values in self._data.items()
        }
        data["metrics"] = [{**metric, "timestamp": ended, "step": 0} for metric in data["metrics"]]
        run = {"info": {**self._info, "status": status, "end_time": ended}, "data": data}
        write_whole(self.folder / RUN_FILE, json.dumps(run, indent=1))


def recorded_runs(folder: Path) -> list[RecordedRun]:
    """Return the runs whose folders lie in a folder, by the time they began; what was not finished has none.

    Raises
    ------
    ExperimentError
        When one is damaged.
    """
    found = [read_run(file.parent) for file in folder.glob(f"*/{RUN_FILE}")]
    return sorted(found, key=lambda run: run.started_ms)


def read_run(folder: Path) -> RecordedRun:
    """Return the run of a folder."""
    import pandas as pd

    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        info, data = run["info"], run["data"]
        params, metrics, tags = (
            {item["key"]: item["value"] for item in data[kind]} for kind in ("params", "metrics", "tags")
        )
        artifacts = folder / ARTIFACT_FOLDER
        texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(artifacts.glob("*")) if file.is_file()}
        tables = {
            file.stem: pd.DataFrame(json.loads(file.read_text(encoding="utf-8")))
            for file in sorted((artifacts / DATA_FOLDER).glob("*.json"))
        }
        times = int(info["start_time"]), int(info["end_time"])
        name, status = str(info["run_name"]), str(info["status"])
        return RecordedRun("", name, status, *times, params, metrics, tags, texts, tables)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ExperimentError(f"{folder / RUN_FILE} is no record of a run ({error!r:.200}): measure anew") from None


def _now_ms() -> int:
    return int(time.time() * 1000)
