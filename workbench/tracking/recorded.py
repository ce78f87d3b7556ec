"""A run as it was recorded, apart from any store: what a run file and a file of results hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from workbench.tracking.run import ENVIRONMENT_FILE
from workbench.tracking.runs import DIGEST_TAG, NOTEBOOK_TAG
from workbench.tracking.store import decode

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RecordedRun:
    """One run.

    Attributes
    ----------
    run_id : str
        The id that it had where it was recorded; empty where there was no MLflow.
    name, status : str
    started_ms, ended_ms : int
        Milliseconds since 1970.
    params, tags : mapping of str to str
        As MLflow keeps them; `parameters` are typed.
    metrics : mapping of str to float
    texts : mapping of str to str
        Text artifacts by their path: ``environment.json``, ``requirements.txt``.
    tables : mapping of str to DataFrame
    """

    run_id: str
    name: str
    status: str
    started_ms: int
    ended_ms: int
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Parameters with their types."""
        return {name: decode(text) for name, text in self.params.items()}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What the run ran on; empty where that was not recorded."""
        return dict(json.loads(self.texts.get(ENVIRONMENT_FILE, "{}")))

    @property
    def digest(self) -> str:
        """What its sweep knows it by; empty for a run that no sweep made."""
        return self.tags.get(DIGEST_TAG, "")

    @property
    def notebook(self) -> str:
        """The notebook's file name without extension."""
        return self.tags.get(NOTEBOOK_TAG, "")

    @property
    def duration_s(self) -> float:
        """How long it took."""
        return (self.ended_ms - self.started_ms) / 1000
