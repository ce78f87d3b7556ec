"""What is executed to verify a run: which notebook, with which parameters, on how many threads.

By default that is the notebook as it was executed, with the parameters that papermill wrote into it. ``current`` takes
the notebook of the same name as it is in the working tree now; a run that was made by hand kept no notebook, there one
has to be named, and it gets the recorded parameters that it knows. Threads are the recorded ones wherever the run is
verified, since sums over more or fewer threads round differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe_core.errors import ExperimentError
from workbench.sweep.values import check_parameter
from workbench.tracking.notebook import find_notebook, notebook_hash, notebook_parameters, read_notebook
from workbench.tracking.place import project_root
from workbench.tracking.record import RunRecord
from workbench.tracking.runs import RECORDED_TAG, SOURCE_TAG

RECORDED, CURRENT = "recorded", "current"
SOURCES = (RECORDED, CURRENT)


@dataclass(frozen=True)
class Plan:
    """What will be executed.

    Attributes
    ----------
    name : str
        File name of the notebook.
    content : dict
        The notebook.
    origin : str
        Where it comes from, for people.
    parameters : dict
        What is handed to it.
    working_folder : Path
        Where it runs: beside the notebook of the working tree, as sweeps do.
    threads : int or None
        Threads that the run recorded.
    remarks : list of str
    """

    name: str
    content: dict[str, Any]
    origin: str
    parameters: dict[str, Any]
    working_folder: Path
    threads: int | None
    remarks: list[str]


def plan_rerun(run: RunRecord, *, source: str = RECORDED, notebook: Path | None = None) -> Plan:
    """Return what has to be executed to make a run again.

    Parameters
    ----------
    run : RunRecord
    source : str
        One of `SOURCES`.
    notebook : Path, optional
        A notebook that is taken instead.

    Raises
    ------
    ExperimentError
        When the run did not finish, kept no notebook, or a recorded parameter does not fit the notebook.
    """
    if source not in SOURCES:
        raise ExperimentError(f"unknown source {source!r}: choose one of {', '.join(SOURCES)}.")
    if run.status != "FINISHED":
        raise ExperimentError(f"{run.describe()} is {run.status.lower()}: only finished runs can be verified.")
    remarks: list[str] = []
    in_tree = notebook or _in_working_tree(run)
    elsewhere = RECORDED_TAG in run.tags
    if notebook is None and run.notebook is None and not (elsewhere and in_tree):
        raise ExperimentError(
            f"{run.describe()} kept no notebook (it was made by hand, or its artifacts are gone). Name the notebook "
            "that made it: --notebook notebooks/NAME.ipynb"
        )
    if elsewhere and run.notebook is None:
        remarks.append("It was recorded elsewhere and kept no notebook: the working tree's is taken.")
    if notebook is None and source == RECORDED and run.notebook is not None:
        content, origin = run.notebook, "the notebook as it was executed, from the run's artifacts"
        if in_tree is None:
            remarks.append("The working tree has no notebook of that name.")
        elif notebook_hash(read_notebook(in_tree)) != notebook_hash(content):
            remarks.append(f"{in_tree.name} of the working tree has other code by now; --source current takes that.")
    else:
        if in_tree is None:
            raise ExperimentError(
                f"the working tree has no notebook {run.tags.get(SOURCE_TAG, run.notebook_name)!r}: leave --source out "
                "to run it as it was executed."
            )
        content, origin = read_notebook(in_tree), f"{in_tree} as it is now"
        if run.notebook is not None and notebook_hash(content) != notebook_hash(run.notebook):
            remarks.append("Its code is not the code that made the run.")
    handed = None if run.notebook is None else run.notebook.get("metadata", {}).get("papermill", {}).get("parameters")
    if handed is None or notebook is not None:
        assert in_tree is not None
        handed, missing = _fitting(run, in_tree)
        if missing:
            remarks.append(f"Not recorded, so the notebook's defaults are used: {', '.join(missing)}.")
    name = in_tree.name if in_tree is not None else f"{run.notebook_name or 'notebook'}.ipynb"
    folder = in_tree.parent if in_tree is not None else project_root()
    return Plan(name, content, origin, dict(handed), folder, run.environment.get("threads"), remarks)


def _fitting(run: RunRecord, notebook: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the recorded parameters that a notebook knows, and those of the notebook that were not recorded."""
    known = notebook_parameters(notebook)
    # Some notebooks record these two as identity only.
    identity = {name: run.environment.get(name) for name in ("seed", "dtype")}
    recorded = {name: value for name, value in identity.items() if value is not None} | run.params
    fitting = {name: value for name, value in recorded.items() if name in known}
    if not fitting:
        raise ExperimentError(f"{notebook} takes none of the parameters of {run.describe()}: name another notebook.")
    for name, value in fitting.items():
        check_parameter(notebook, known, name, value)
    return fitting, [name for name in known if name not in fitting]


def _in_working_tree(run: RunRecord) -> Path | None:
    for name in (run.tags.get(SOURCE_TAG), f"notebooks/{run.notebook_name}.ipynb" if run.notebook_name else None):
        if name and name.endswith(".ipynb"):
            try:
                return find_notebook(name)
            except ExperimentError:
                continue
    return None
