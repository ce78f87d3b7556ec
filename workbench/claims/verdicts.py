"""How claims fared when they were run again last: ``verdicts.json`` beside the recorded results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emoe_core.errors import ExperimentError
from emoe_core.files import write_whole
from workbench.tracking.results_file import RESULTS

VERDICTS = "verdicts.json"
REPRODUCED, WITHIN, NOT = "reproduced", "within tolerance", "not reproduced"


@dataclass(frozen=True)
class Verdict:
    """What a rerun found.

    Attributes
    ----------
    word : str
        "reproduced" (the same bits), "within tolerance" or "not reproduced".
    value : float or None
        What was found; None where the rerun failed.
    date, commit, machine : str
    """

    word: str
    value: float | None
    date: str
    commit: str
    machine: str

    def sentence(self, text: Callable[[float], str]) -> str:
        """Return it in a line; ``text`` is how the claim's values are shown."""
        value = "" if self.value is None else f" ({text(self.value)})"
        return f"{self.word}{value}, {self.date}, commit {self.commit[:7]}, {self.machine}"


def machine_name(environment: Mapping[str, Any]) -> str:
    """Return in words the processor of a recorded environment."""
    return f"{environment.get('cores', '?')} cores of {environment.get('cpu', 'an unknown CPU')}"


def read_verdicts(folder: Path = RESULTS) -> dict[str, Verdict]:
    """Return the last verdicts by claim; ExperimentError where the file is damaged."""
    file = folder / VERDICTS
    if not file.exists():
        return {}
    try:
        return {name: Verdict(**item) for name, item in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ExperimentError(f"{file} holds no verdicts ({error}): restore it from version control.") from None


def write_verdicts(verdicts: Mapping[str, Verdict], folder: Path = RESULTS) -> Path:
    """Write the last verdicts, by name, and return the file."""
    every = {name: asdict(verdicts[name]) for name in sorted(verdicts)}
    return write_whole(folder / VERDICTS, json.dumps(every, indent=1) + "\n")
