"""MLflow's client as the workbench uses it: artifacts lie beside the store, and what goes wrong is told in one line.

MLflow keeps absolute locations of artifacts, which lead nowhere, or into another project, once the folder is moved,
copied or mounted elsewhere. Here the part below ``mlruns`` counts, wherever that lies now.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import FileInfo
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking import MlflowClient

from workbench.machine.environment import ENVIRONMENT_TAGS
from workbench.tracking.store_errors import StoreError, store_errors
from workbench.tracking.store_file import ARTIFACTS, location_here


class StoreClient(MlflowClient):
    """A client of the store.

    Parameters
    ----------
    uri : str
        Address of the store.
    folder : Path, optional
        Of a store on this disk: where it lies (``mlruns``). A server knows where its artifacts are.

    Raises
    ------
    StoreError, DeletedError
        By every method, see `store_errors`.
    """

    def __init__(self, uri: str, folder: Path | None = None) -> None:
        super().__init__(tracking_uri=uri)
        self._folder = folder

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found if name.startswith("_") or not callable(found) else store_errors()(found)

    def list_artifacts(self, run_id: str, path: str | None = None) -> list[FileInfo]:
        """Return what a run recorded in one of its folders."""
        return list(self._recorded(run_id).list_artifacts(path))

    def download_artifacts(self, run_id: str, path: str, dst_path: str | None = None) -> str:
        """Return where a file or folder of a run can be read: a copy in `dst_path` where that is given."""
        return str(self._recorded(run_id).download_artifacts(path, dst_path))

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        """Record a file or a folder."""
        if Path(local_path).is_dir():
            self.log_artifacts(run_id, local_path, str(PurePosixPath(artifact_path or "") / Path(local_path).name))
        else:
            self._artifacts(run_id).log_artifact(local_path, artifact_path)

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Record what lies in a folder."""
        self._artifacts(run_id).log_artifacts(local_dir, artifact_path)

    def _artifacts(self, run_id: str) -> ArtifactRepository:
        recorded = str(self.get_run(run_id).info.artifact_uri)
        place = location_here(recorded, self._folder) if self._folder else recorded
        return get_artifact_repository(place, tracking_uri=self.tracking_uri)

    def _recorded(self, run_id: str) -> ArtifactRepository:
        """Return where a run's artifacts are, and refuse a run that had some: without them it looks like an empty one.

        A run that records anything records its environment first, as a file and as tags.
        """
        found = self._artifacts(run_id)
        if not isinstance(found, LocalArtifactRepository) or Path(found.artifact_dir).is_dir():
            return found
        if any(name.startswith(ENVIRONMENT_TAGS) for name in self.get_run(run_id).data.tags):
            raise StoreError(
                f"the artifacts of run {run_id} are gone from {found.artifact_dir}. Bring the folder {ARTIFACTS} along "
                "with the store's database, or delete that run in the MLflow UI."
            )
        return found
