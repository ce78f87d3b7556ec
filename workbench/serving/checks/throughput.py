"""How much one engine serves at equal memory: residents chosen by prediction, experts loaded on demand, all resident.

All requests wait from the start, so the engine is never idle and the batch is full until the last ones run: this is
throughput, not latency. Each system serves the same requests with the same lengths, in order of arrival, by the real
loop. Systems take turns, so that a machine that slows down slows all of them; each is loaded anew and serves a prompt
of every task first, unmeasured. By these it predicts, and again before every sixth request: what swaps cost is in.

=============  ====================================================================================================
system         what runs
=============  ====================================================================================================
emoe           the engine as it serves: residents by decayed frequency, absent experts replaced (tolerance 1)
emoe exact     the same residents, absent experts loaded (tolerance 0)
on demand      LRU on demand, exact: what an offloading cache does, on our engine
all resident   every expert in memory: the bound, and not equal memory
=============  ====================================================================================================

Replacing experts costs quality, which is not measured here but by notebook 08 at the same budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

import emoe_core
from emoe_core.errors import OptionError
from emoe_core.planning.tasks import TASK_TYPES
from emoe_core.scheduler import BatchLimits, make_scheduler
from emoe_core.serving.loop import ServingLoop
from workbench.machine.busy import OtherWork
from workbench.models.names import resolve_model
from workbench.serving.costs.task_loads import cut, task_tokens

Progress = Callable[[str, int, int], None]
ON_DEMAND, RESIDENT = "on demand", "all resident"
SYSTEMS: dict[str, dict[str, Any]] = {
    "emoe": {"tolerance": 1.0, "interval": len(TASK_TYPES)},
    "emoe exact": {"tolerance": 0.0, "interval": len(TASK_TYPES)},
    ON_DEMAND: {"tolerance": 0.0, "predictor": None, "policy": "lru"},
    RESIDENT: {"budget": "100%"},
}


@dataclass(frozen=True)
class ThroughputConfig:
    """What is served.

    Attributes
    ----------
    model : str
    budget : str
        Expert memory of every system but `RESIDENT`.
    systems : tuple of str
        Of `SYSTEMS`.
    n_requests : int
    max_batch : int
    input_tokens, output_tokens : int
        Of every request; tasks take turns.
    repeats : int
        How often each system is loaded and serves.
    source, dtype, device, seed
        As in `ExperimentConfig`.
    """

    model: str = "reference"
    budget: str = "60%"
    systems: tuple[str, ...] = tuple(SYSTEMS)
    n_requests: int = 16
    max_batch: int = 8
    input_tokens: int = 32
    output_tokens: int = 24
    repeats: int = 3
    source: str = "embedded"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.systems) - set(SYSTEMS))
        if unknown or not self.systems:
            raise OptionError(f"unknown systems {', '.join(unknown) or '(none)'}: choose of {', '.join(SYSTEMS)}")
        for name in ("n_requests", "max_batch", "input_tokens", "output_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}: give at least 1")


def measure_throughput(config: ThroughputConfig, progress: Progress | None = None) -> pd.DataFrame:
    """Serve the same requests by every system in turn.

    Returns
    -------
    DataFrame
        One row a system and repeat: ``system, repeat, tokens, seconds, tokens_per_s, hit_rate, loads, bytes_loaded,
        stall_share, slot_bytes, others_cpu_share``.
    """
    rows = []
    for repeat in range(config.repeats):
        for place, name in enumerate(config.systems):
            if progress is not None:
                progress("throughput", repeat * len(config.systems) + place, config.repeats * len(config.systems))
            rows.append({"system": name, "repeat": repeat, **_serve(config, SYSTEMS[name])})
    if progress is not None:
        progress("throughput", len(rows), len(rows))
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return medians and ranges of a table of `measure_throughput`, and each system's throughput over on demand's.

    The ratio is that of one repeat, both systems having served within minutes: its median, smallest and largest.
    """
    speeds = table.pivot(index="repeat", columns="system", values="tokens_per_s")
    rows = []
    for name in dict.fromkeys(table["system"]):
        mine = table[table["system"] == name]
        row: dict[str, Any] = {"system": name}
        row |= {column: mine[column].median() for column in ("tokens_per_s", "hit_rate", "stall_share", "slot_bytes")}
        row |= {"tokens_per_s_low": speeds[name].min(), "tokens_per_s_high": speeds[name].max()}
        if ON_DEMAND in speeds:
            ratio = speeds[name] / speeds[ON_DEMAND]
            row |= {"ratio": ratio.median(), "ratio_low": ratio.min(), "ratio_high": ratio.max()}
        rows.append(row)
    return pd.DataFrame(rows)


def _serve(config: ThroughputConfig, options: dict[str, Any]) -> dict[str, float]:
    common: dict[str, Any] = {"budget": config.budget, "dtype": config.dtype, "device": config.device}
    with emoe_core.load(resolve_model(config.model), seed=config.seed, **common | options) as engine:
        texts = task_tokens(engine, config.source, "test", config.seed)
        engine.load_all()
        loop = ServingLoop(engine, make_scheduler("fcfs", None), BatchLimits(config.max_batch, 10**9))
        for task in TASK_TYPES:
            loop.submit(cut(texts[task], config.input_tokens), task, 2)
        loop.run()
        for place in range(config.n_requests):
            task = TASK_TYPES[place % len(TASK_TYPES)]
            start = place // len(TASK_TYPES)
            loop.submit(cut(texts[task][start:], config.input_tokens), task, config.output_tokens)
        engine.reset_counters()
        others, started = OtherWork(), time.perf_counter()
        tokens = sum(len(answer.token_ids) for answer in loop.run())
        seconds = time.perf_counter() - started
        counters = engine.stats().counters
        return {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "hit_rate": counters.hit_rate,
            "loads": counters.loads,
            "bytes_loaded": counters.bytes_loaded,
            "stall_share": counters.stall_s / seconds,
            "slot_bytes": float(engine.loader.slot_bytes),
            "others_cpu_share": others.share(),
        }
