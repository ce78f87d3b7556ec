"""What serving one model costs in time: the profiled constants of Eq. 3 (paper, section 3.5) and of simulations.

Terms
-----
prefill cost
    Seconds to run a prompt of W tokens alone: ``prefill_fixed_s + W * prefill_token_s``.
step cost
    Seconds of one decode step of b sequences, measured at some b and interpolated between; it gives each one token.
    The paper's ``c`` per token is the step cost over b.
load
    Seconds until one absent expert is in its slot, when a plan swaps many: the slope of time over experts. ``swap_s``
    is the rest: what a swap takes however few experts it moves.
prediction
    Seconds to ask the predictor and plan, once.
load of a task
    What its requests look like: samples of input and output lengths, and the share of each layer's choices that fall on
    each expert. Who is resident decides what a request costs, so these belong to the costs.

Costs hold for one model, one machine and one configuration of the engine; the file says which. Measuring is
`workbench.serving.costs.measure`'s matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict

from emoe_core.errors import EmoeError
from emoe_core.files import read_object, typed, write_whole

COSTS_FORMAT = 1
LARGEST = 1 << 53  # the largest whole numbers that floats still tell apart


class CostsError(EmoeError):
    """Serving costs are missing, damaged, or were measured on another model."""


@dataclass(frozen=True)
class TaskLoad:
    """What the requests of one task look like.

    Attributes
    ----------
    input_tokens, output_tokens : tuple of int
        Samples of lengths, each equally likely.
    expected_output_tokens : float
        What a scheduler is told to expect (the profile's mean).
    shares : tuple of tuple of float, MoE layers x experts
        Share of a layer's routed choices that fall on each expert; rows add up to 1.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    input_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    expected_output_tokens: float
    shares: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        lengths = (*self.input_tokens, *self.output_tokens)
        if not self.input_tokens or not self.output_tokens or not 1 <= min(lengths) <= max(lengths) <= LARGEST:
            raise CostsError("a task's lengths must be samples of 1 token or more; measure the costs again.")
        if not self.expected_output_tokens >= 1:
            raise CostsError(f"a task expects {self.expected_output_tokens} output tokens; it must be 1 or more.")
        rows = np.array(self.shares, dtype=float)
        if rows.ndim != 2 or (rows < 0).any() or not np.allclose(rows.sum(axis=1), 1.0, atol=1e-3):
            raise CostsError("the shares of a layer's experts must add up to 1; measure the costs again.")


@dataclass(frozen=True)
class ServingCosts:
    """Profiled costs of serving one model.

    Attributes
    ----------
    model_hash : str
        Content hash of the checkpoint.
    prefill_token_s, prefill_fixed_s : float
        Slope and intercept of a prompt's time.
    decode_batches : tuple of int
        Batch sizes at which a step was measured, ascending.
    decode_step_s : tuple of float
        Median seconds of a step at each of them.
    expert_load_s, swap_s, prediction_s : float
    slots_per_layer : tuple of int
        Experts that each layer holds under the measured budget.
    kv_token_bytes : int
        KV cache of one token of one sequence.
    tasks : mapping of str to TaskLoad
    settings : mapping
        How it was measured: budget, dtype, tolerance, seed, threads.
    environment : mapping
        The machine, and the share of its processors that others used meanwhile.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model_hash: str
    prefill_token_s: float
    prefill_fixed_s: float
    decode_batches: tuple[int, ...]
    decode_step_s: tuple[float, ...]
    expert_load_s: float
    swap_s: float
    prediction_s: float
    slots_per_layer: tuple[int, ...]
    kv_token_bytes: int
    tasks: Mapping[str, TaskLoad] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        times = (
            self.prefill_token_s,
            self.prefill_fixed_s,
            self.expert_load_s,
            self.swap_s,
            self.prediction_s,
            *self.decode_step_s,
        )
        if not all(0 <= value <= LARGEST for value in times):
            raise CostsError("a serving cost is negative or not a number; measure the costs again.")
        whole = (*self.decode_batches, *self.slots_per_layer, self.kv_token_bytes)
        if not all(0 <= value <= LARGEST for value in whole):
            raise CostsError("a number of sequences, slots or bytes is negative or absurd; measure the costs again.")
        ascending = all(a < b for a, b in zip((0, *self.decode_batches), self.decode_batches, strict=False))
        if not self.decode_batches or not ascending or len(self.decode_batches) != len(self.decode_step_s):
            raise CostsError("decode steps need ascending batch sizes with a time each; measure the costs again.")
        if not self.decode_step_s[0] > 0:
            raise CostsError("a decode step takes no time, by these costs; measure them again.")
        for name, task in self.tasks.items():
            if len(task.shares) != len(self.slots_per_layer):
                raise CostsError(f"task {name!r} has shares for another number of layers; measure the costs again.")

    def prefill_s(self, input_tokens: int) -> float:
        """Return the seconds of a prompt's forward pass."""
        return self.prefill_fixed_s + input_tokens * self.prefill_token_s

    def step_table_s(self, largest: int) -> np.ndarray:
        """Return the seconds of a step at every batch size 0..largest, float64 [largest + 1]; entry 0 is 0.

        Linear between measured sizes; beyond the largest, the slope of the last two goes on (one size: in proportion).
        No size is cheaper than a smaller one, whatever noise was measured.
        """
        sizes = np.arange(largest + 1, dtype=float)
        batches, seconds = np.array(self.decode_batches, dtype=float), np.maximum.accumulate(self.decode_step_s)
        table = np.interp(sizes, batches, seconds)
        beyond = sizes > batches[-1]
        if len(batches) > 1:
            slope = (seconds[-1] - seconds[-2]) / (batches[-1] - batches[-2])
        else:
            slope = seconds[-1] / batches[-1]
        table[beyond] = seconds[-1] + slope * (sizes[beyond] - batches[-1])
        table[0] = 0.0
        return table

    def loads_s(self, experts: int) -> float:
        """Return the seconds of a swap that loads this many experts; nothing to load takes no time."""
        return self.swap_s + experts * self.expert_load_s if experts else 0.0

    def require_model(self, model_hash: str) -> None:
        """Raise `CostsError` when the costs are another model's."""
        if model_hash != self.model_hash:
            raise CostsError(
                f"the serving costs were measured on model {self.model_hash[:12]}, this model is {model_hash[:12]}. "
                f"Measure this model's with `emoe model costs MODEL`."
            )

    def save(self, path: str | Path) -> Path:
        """Write the costs as JSON, atomically, and return the path."""
        return write_whole(path, json.dumps({"format": COSTS_FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: str | Path, model_hash: str | None = None) -> ServingCosts:
        """Read costs, and check that they are the model's when a hash is given.

        Raises
        ------
        CostsError
            When the file is missing, damaged, of another format, or another model's.
        """
        source = Path(path)
        try:
            content = read_object(
                source, (COSTS_FORMAT,), CostsError, "costs", "serving costs", "measure them again: `emoe model costs`"
            )
        except FileNotFoundError:
            raise CostsError(f"no serving costs at {source}: measure them with `emoe model costs MODEL`.") from None
        try:
            if "tasks" not in content:
                raise ValueError("tasks: Field required")
            costs = typed(cls, content)
        except ValueError as error:
            raise CostsError(f"{source} is not a complete file of serving costs ({error}); measure again.") from error
        if model_hash is not None:
            costs.require_model(model_hash)
        return costs
