"""What every configuration can do within one memory limit, as tables: the whole of `longest` at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.machine.control_groups import find_controller
from workbench.measure.limit_trials import Configuration, Trials
from workbench.measure.longest import Progress, SearchConfig, resolve_limit, search
from workbench.tracking.findings import Findings


def measure_longest(
    checkpoint: str | Path,
    config: SearchConfig,
    tried: Sequence[Configuration],
    progress: Progress,
    **processes: Any,
) -> Findings:
    """Find the limit, and under it each configuration's longest prompt and largest batch.

    Parameters
    ----------
    checkpoint : str or Path
    config : SearchConfig
    tried : sequence of Configuration
    progress : callable
        Called with (stage, done, total).
    **processes
        Options of `Trials`: ``new_tokens, timeout_s, dtype, seed``.

    Returns
    -------
    Findings
        ``found`` (`longest.search`) and ``trials`` (`Trials.frame`, and by what each was limited in ``limited_by``).

    Raises
    ------
    LimitError
        When this machine cannot set hard limits.
    """
    controller = find_controller()
    trials = Trials(checkpoint, controller, **processes)
    found = search(trials, config, tried, resolve_limit(trials, config, progress), progress)
    identity = {"model_hash": trials.index.source_hash, "dtype": str(trials.index.dtype).removeprefix("torch.")}
    tables = {"found": found, "trials": trials.frame().assign(limited_by=controller.description)}
    return Findings(tables, identity, len(trials.done))
