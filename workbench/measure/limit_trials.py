"""Trials under a hard memory limit: does a configuration survive prompts of a length and a batch size?

A *trial* is a fresh process (`limit_job.py`) under the limit (`fresh_process.py` says what counts). It *survives* when
it ends by itself with exit code 0. It does not when the limit's killer ended it, when it could not get memory, or when
it was still running after ``timeout_s`` with its limit reached (near the limit the kernel may read a program's files
again and again instead of killing it). Any other failure is an error, and counts as nothing. Before a trial the
checkpoint's files are dropped from the page cache, so that their pages are the trial's own; that fails while another
process maps them, so nothing else should have the model loaded.

Finished trials, but for the slow ones, are kept in the cache directory by what they depend on, so an interrupted search
goes on. Only host memory is limited: models run on the CPU here.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import ExperimentError
from emoe_core.files import write_whole
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.loader.pack import ensure_pack
from workbench.machine.control_groups import Controller
from workbench.machine.environment import available_cores
from workbench.measure.launch import FAILED, MEASURED, TOO_SLOW, Launched, launch
from workbench.measure.result_cache import result_file

STOCK = "stock"
SURVIVED = "survived"
FIGURES = ("load_s", "ttft_s", "decode_tokens_per_s", "decode_read_bytes")


@dataclass(frozen=True)
class Configuration:
    """What is tried: stock transformers (no options), or emoe with some options of `emoe_core.load`."""

    name: str
    options: tuple[tuple[str, Any], ...] | None


@dataclass(frozen=True)
class Trial:
    """One trial and what became of it; times, in seconds, and speed are missing when it did not survive.

    ``outcome`` is `SURVIVED` or one of `launch`'s. ``group_peak_bytes`` counts the page cache; ``decode_read_bytes``
    came from the disk while decoding.
    """

    configuration: str
    prompt_tokens: int
    batch: int
    limit_bytes: int
    outcome: str
    group_peak_bytes: int | None
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
        launched = launch(
            "workbench.measure.limit_job",
            spec,
            uncached=self._files,
            limit_bytes=limit_bytes,
            controller=self.controller,
            timeout_s=self._timeout_s,
        )
        return Trial(
            name,
            spec["prompt_tokens"],
            spec["batch"],
            limit_bytes,
            trial_outcome(launched),
            launched.group_peak_bytes,
            launched.limit_hits,
            launched.duration_s,
            **{figure: launched.found.get(figure) for figure in FIGURES},
        )

    def _stored(self, spec: dict[str, Any]) -> Path:
        place = {
            "checkpoint": self.index.source_hash,
            "cgroup": self.controller.version,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "cores": available_cores(),
        }
        return result_file("limit-trials", {**spec, **place})


def trial_outcome(launched: Launched) -> str:
    """Return what a trial came to; ExperimentError when it is neither survival nor want of memory."""
    if launched.outcome == TOO_SLOW and not launched.limit_hits:
        raise ExperimentError(
            f"a trial took longer than {launched.duration_s:.0f} s without reaching its limit: raise timeout_s, or "
            f"lower the lengths that are tried"
        )
    if launched.outcome == FAILED:
        raise ExperimentError(f"a trial failed for another reason than memory: {launched.error}")
    return SURVIVED if launched.outcome == MEASURED else launched.outcome
