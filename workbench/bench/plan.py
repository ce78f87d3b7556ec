"""What one bench measures: validated settings, and the folder that a bench rests in.

A bench's folder holds ``plan.json`` (these settings), ``results.jsonl`` (one line a measured process, appended when it
ends), ``prepared.json`` (tokens, routing, bandwidths, budget: made once) and, at the end, ``summary.json``, the table
and the figure. The same command in the same folder goes on where it stopped; other settings there are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emoe_core.budget import Budget, amount_bytes
from emoe_core.errors import OptionError
from workbench.systems.systems import DEFAULT_SYSTEMS, System, find_systems

PLAN_FILE, RESULTS_FILE, PREPARED_FILE, SUMMARY_FILE = "plan.json", "results.jsonl", "prepared.json", "summary.json"
LEAST_REPEATS = 5
FREE = ("repeats", "systems")  # settings that may change between calls: more of them only add processes


@dataclass(frozen=True)
class BenchPlan:
    """Settings of a bench.

    Attributes
    ----------
    model : str
        Checkpoint folder or embedded model.
    limit : str or None
        Hard memory limit ("2.2GB"); None: no limit, for every system.
    budget : str or None
        Expert budget of the emoe systems; None: what the limit leaves (`workbench.bench.limit_budget`).
    systems : tuple of str
        Names of `workbench.systems.systems`.
    repeats : int
        Processes of each system; below `LEAST_REPEATS` the summary says that it is only a trial.
    tokens : int
        Tokens decoded in the timed part.
    prompt_tokens, warm_tokens : int
        Length of the prompt, and tokens decoded after it, untimed, before the timed sequence starts.
    dtype : str
        Of the computation and of the GGUF file: "auto" is the checkpoint's.
    threads : int
        Computing threads of every system.
    max_seconds : float
        Decoding of one process stops after this long; the tokens until then count.
    seed : int
        Of token ids where the model brings none, and of the order of systems.
    """

    model: str
    limit: str | None = None
    budget: str | None = None
    systems: tuple[str, ...] = DEFAULT_SYSTEMS
    repeats: int = LEAST_REPEATS
    tokens: int = 128
    prompt_tokens: int = 32
    warm_tokens: int = 16
    dtype: str = "auto"
    threads: int = field(default=1)
    max_seconds: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "systems", tuple(self.systems))
        for name in ("repeats", "tokens", "prompt_tokens", "warm_tokens", "threads"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.max_seconds <= 0:
            raise OptionError(f"max_seconds is {self.max_seconds}: give more than 0")
        self.found_systems()
        if self.budget is not None:
            Budget.parse(self.budget)
        assert self.limit_bytes is None or self.limit_bytes > 0

    @property
    def limit_bytes(self) -> int | None:
        """The limit in bytes, None without one."""
        return None if self.limit is None else amount_bytes(self.limit)

    @property
    def folder_name(self) -> str:
        """Return a name for the folder of this bench's results that no bench with other settings has."""
        settings = {name: value for name, value in asdict(self).items() if name not in FREE}
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]
        told = [Path(self.model).name, self.limit or "no limit", *([self.budget] if self.budget else []), digest]
        return re.sub(r"[^\w.%-]+", "-", "-".join(told))

    @property
    def max_tokens(self) -> int:
        """Longest sequence that a system meets."""
        return self.prompt_tokens + max(self.tokens, self.warm_tokens)

    def found_systems(self) -> list[System]:
        """Return the systems, in order."""
        return find_systems(self.systems)

    def is_limited(self, system: System) -> bool:
        """Whether a system runs under the limit."""
        return self.limit is not None and system.limited


def open_folder(folder: Path, plan: BenchPlan) -> None:
    """Make a bench's folder, or see that it belongs to the same plan.

    Raises
    ------
    OptionError
        When the folder holds another bench.
    """
    file = folder / PLAN_FILE
    content = json.loads(json.dumps(asdict(plan)))
    if file.exists():
        held: dict[str, Any] = json.loads(file.read_text())
        other = sorted(name for name in content if name not in FREE and held.get(name) != content[name])
        if other:
            raise OptionError(
                f"{folder} holds a bench with other settings ({', '.join(other)}): give another --out, or remove it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))
