"""Trials under a hard memory limit: does a configuration survive prompts of a length and a batch size?

A *trial* is a fresh process (`limit_job.py`) under the limit (`hard_limit.py`, which says what counts). It
*survives* when it ends by itself with exit code 0. It does not when the limit's killer ended it, when it could not get
memory, or when it was still running after ``timeout_s`` with its limit reached (near the limit the kernel may read a
program's files again and again instead of killing it). Any other failure is an error, and counts as nothing. Before a
trial the checkpoint's files are dropped from the page cache, so that their pages are the trial's own; that fails while
another process maps them, so nothing else should have the model loaded.

Finished trials, but for the slow ones, are kept in the cache directory by what they depend on, so an interrupted search
goes on. Only host memory is limited: models run on the CPU here.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import ExperimentError
from emoe_core.files import write_whole
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.loader.pack import ensure_pack
from workbench.machine.control_groups import Controller
from workbench.machine.environment import available_cores
from workbench.measure import job as measured_job
from workbench.measure import limit_job as longest_trial
from workbench.measure.hard_limit import LimitedRun, drop_cached, run_limited

STOCK = "stock"
SURVIVED, KILLED, NO_MEMORY, TOO_SLOW = "survived", "killed by the limit", "out of memory", "too slow at the limit"


@dataclass(frozen=True)
class Configuration:
    """What is tried: stock transformers (no options), or emoe with some options of `emoe_core.load`."""

    name: str
    options: tuple[tuple[str, Any], ...] | None


@dataclass(frozen=True)
class Trial:
    """One trial and what became of it; times, in seconds, and speed are missing when it did not survive.

    ``peak_bytes`` is the group's, page cache included; ``decode_read_bytes`` came from the disk while decoding.
    """

    configuration: str
    prompt_tokens: int
    batch: int
    limit_bytes: int
    outcome: str
    peak_bytes: int | None
    limit_hits: int
    duration_s: float
    load_s: float | None = None
    ttft_s: float | None = None
    decode_tokens_per_s: float | None = None
    decode_read_bytes: float | None = None

    @property
    def survived(self) -> bool:
        return self.outcome == SURVIVED


class Trials:
    """Runs trials of one checkpoint, remembers them, and takes finished ones from the cache.

    Parameters
    ----------
    checkpoint : str or Path
    controller : Controller
        From `find_controller`.
    new_tokens : int
        Tokens decoded after the prompt.
    timeout_s : float
    dtype : str
        "auto" is the checkpoint's own.
    seed : int
        Of the prompts' token ids.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        controller: Controller,
        *,
        new_tokens: int = 8,
        timeout_s: float = 300.0,
        dtype: str = "auto",
        seed: int = 0,
    ) -> None:
        self.index = open_checkpoint(checkpoint, dtype)
        self.controller = controller
        self.done: list[Trial] = []
        self._timeout_s = timeout_s
        self._common = {"checkpoint": str(self.index.path), "dtype": dtype, "new_tokens": new_tokens, "seed": seed}
        # Written here and now: a trial would have to do it under its limit.
        pack = ensure_pack(self.index, cache_dir() / "packs")
        self._files = [*(shard.file for shard in self.index.shards), pack.path]
        self._code = _code_digest()

    def run(
        self, configuration: Configuration, prompt_tokens: int, batch: int, limit_bytes: int, *, again: bool = False
    ) -> Trial:
        """Run one trial, or take it from the cache, unless it is to be run ``again`` (times of another day mislead).

        Raises
        ------
        ExperimentError
            When the process failed for another reason than memory.
        LimitError
            When the limit cannot be set.
        """
        options = None if configuration.options is None else dict(configuration.options)
        spec = {**self._common, "options": options, "prompt_tokens": prompt_tokens, "batch": batch}
        stored = self._stored({**spec, "limit_bytes": limit_bytes, "timeout_s": self._timeout_s})
        if stored.exists() and not again:
            trial = Trial(**{**json.loads(stored.read_text()), "configuration": configuration.name})
        else:
            trial = self._fresh(configuration.name, spec, limit_bytes)
            # Whether it was too slow also depends on what else the machine did: that is asked again.
            if trial.outcome != TOO_SLOW:
                write_whole(stored, json.dumps(asdict(trial)))
        if trial not in self.done:
            self.done.append(trial)
        return trial

    def frame(self) -> pd.DataFrame:
        """Return all trials so far, one row each, in the order of their first run."""
        return pd.DataFrame([asdict(trial) for trial in self.done], columns=[item.name for item in fields(Trial)])

    def _fresh(self, name: str, spec: dict[str, Any], limit_bytes: int) -> Trial:
        drop_cached(self._files)
        with tempfile.TemporaryDirectory() as scratch:
            source, target = Path(scratch) / "spec.json", Path(scratch) / "result.json"
            source.write_text(json.dumps(spec))
            command = [sys.executable, "-m", longest_trial.__name__, str(source), str(target)]
            env = {**os.environ, "EMOE_RUN_ID": ""}
            run = run_limited(command, limit_bytes, controller=self.controller, timeout_s=self._timeout_s, env=env)
            found = json.loads(target.read_text()) if run.returncode == 0 and target.exists() else {}
        return Trial(
            name,
            spec["prompt_tokens"],
            spec["batch"],
            limit_bytes,
            outcome_of(run, bool(found)),
            run.peak_bytes,
            run.limit_hits,
            run.duration_s,
            **found,
        )

    def _stored(self, spec: dict[str, Any]) -> Path:
        place = {
            **spec,
            "checkpoint": self.index.source_hash,
            "code": self._code,
            "cgroup": self.controller.version,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "cores": available_cores(),
        }
        digest = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()
        return cache_dir() / "limit-trials" / f"{digest[:24]}.json"


def outcome_of(run: LimitedRun, answered: bool) -> str:
    """Return the outcome of a trial's process; ExperimentError when it is neither survival nor want of memory."""
    if run.timed_out and run.limit_hits > 0:
        return TOO_SLOW
    if run.timed_out:
        raise ExperimentError(
            f"a trial took longer than {run.duration_s:.0f} s without reaching its limit: raise timeout_s, or lower "
            f"the lengths that are tried"
        )
    if run.killed_by_limit:
        return KILLED
    if run.returncode == measured_job.NO_MEMORY:
        return NO_MEMORY
    if run.returncode != 0 or not answered:
        last = run.errors.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
        raise ExperimentError(f"a trial failed for another reason than memory: {last[0]}")
    return SURVIVED


def _code_digest() -> str:
    """Name everything but the model and the question that a trial's outcome depends on."""
    digest = hashlib.sha256(sys.version.encode())
    for library in ("torch", "transformers", "safetensors"):
        digest.update(version(library).encode())
    trial = (Path(longest_trial.__file__), Path(measured_job.__file__))
    for source in [*sorted(Path(emoe_core.__file__).parent.rglob("*.py")), *trial]:
        digest.update(source.read_bytes())
    return digest.hexdigest()
