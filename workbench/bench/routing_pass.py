"""What the model in fact routes on the bench's tokens: one exact pass, unmeasured, in a process of its own.

From it come the bytes that the timed tokens route to (what any system that computes the model must have at hand), the
fewest misses that a cache of given slots could have (Belady), and, for a checkpoint with recorded routing, whether the
model follows the recording. The trace is kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from emoe_core.checkpoint.index import CheckpointIndex, open_checkpoint
from emoe_core.experts.trace import RoutingTrace
from emoe_core.files import whole_file
from emoe_core.loader.cache_folder import cache_dir
from workbench.bench.forced_tokens import ForcedTokens
from workbench.measure.job import answer_job
from workbench.measure.launch import launch
from workbench.models.synthetic.writer import TRACE_FILE
from workbench.replay.accesses import Accesses, accesses_of
from workbench.replay.bound import fewest_misses
from workbench.systems.engine import EngineDecoder


@dataclass(frozen=True)
class RoutingPass:
    """Routing of the warm-up and the timed sequence.

    Attributes
    ----------
    trace : RoutingTrace
        Request 0 is the warm-up, request 1 the timed sequence.
    path : Path
        Its file.
    timed_steps : bool [S]
        Steps of ``accesses`` that are timed decoding.
    agreement : float or None
        Share of choices that are those of the checkpoint's recorded routing; None without one.
    """

    trace: RoutingTrace
    path: Path
    accesses: Accesses
    timed_steps: np.ndarray
    agreement: float | None

    def routed_experts(self, tokens: int | None = None) -> int:
        """Return the distinct (step, layer, expert) of the first timed tokens; all of them when None."""
        return int(self.accesses.needed[self._first(tokens)].sum())

    def belady_misses(self, slots_per_layer: Sequence[int], tokens: int | None = None) -> int:
        """Return the fewest misses in the timed tokens, of a cache that also served what came before."""
        return int(fewest_misses(self.accesses.needed, slots_per_layer)[self._first(tokens)].sum())

    def _first(self, tokens: int | None) -> np.ndarray:
        return np.flatnonzero(self.timed_steps)[:tokens]


def routing_pass(checkpoint: str | Path, forced: ForcedTokens, dtype: str = "auto") -> RoutingPass:
    """Return the routing of a bench's tokens, from the cache or from a process made for it."""
    index = open_checkpoint(checkpoint, dtype)
    content = {"model": index.source_hash, "dtype": str(index.dtype), "tokens": asdict(forced)}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_dir() / "bench-routing" / f"{key}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _record(index, forced, dtype, path)
    trace = RoutingTrace.load(path)
    accesses = accesses_of(trace, [len(forced.warm_prompt), len(forced.prompt)])
    steps = np.arange(len(accesses))
    timed = steps > 1 + len(forced.warm)
    assert int(timed.sum()) == len(forced.timed), (len(accesses), len(forced.timed))
    return RoutingPass(trace, path, accesses, timed, _agreement(index, trace, forced))


def _record(index: CheckpointIndex, forced: ForcedTokens, dtype: str, path: Path) -> None:
    # All experts where memory has room for them twice over; exactness does not depend on it.
    budget = "100%" if 2 * index.expert_bytes_total < psutil.virtual_memory().available else "25%"
    spec = {"checkpoint": str(index.path), "dtype": dtype, "budget": budget, "target": str(path)}
    launched = launch("workbench.bench.routing_pass", {**spec, "forced": asdict(forced)})
    launched.answer("the routing of the bench's tokens could not be recorded")


def _agreement(index: CheckpointIndex, trace: RoutingTrace, forced: ForcedTokens) -> float | None:
    file = index.path / TRACE_FILE
    if not file.exists():
        return None
    recorded = RoutingTrace.load(file)
    ids = np.array([*forced.warm_prompt, *forced.warm, *forced.prompt, *forced.timed])
    wanted = recorded.chosen[ids]
    same = (trace.chosen[:, :, :, None] == wanted[:, :, None, :]).any(axis=3)
    return float(same.mean())


def _save_routing(spec: dict[str, Any]) -> dict[str, Any]:
    forced = ForcedTokens(**spec["forced"])
    options = {"budget": spec["budget"], "predictor": None, "record": True}
    decoder = EngineDecoder({"checkpoint": spec["checkpoint"], "dtype": spec["dtype"], "options": options})
    for prompt, decoded in ((forced.warm_prompt, forced.warm), (forced.prompt, forced.timed)):
        decoder.prefill(prompt)
        for token in decoded:
            decoder.decode(token)
    with whole_file(spec["target"]) as scratch:
        decoder.engine.trace().save(scratch)
    decoder.close()
    return {}


if __name__ == "__main__":
    sys.exit(answer_job(_save_routing))
