"""Routing traces: which experts each token chose, with what weight, which served it, and how (hit, load, reroute, ...).

A trace is a set of equally long columns, one row per (request, token); experts and weights are arrays over
(row, MoE layer, choice). It rests on disk as one compressed npz file with a format version. Recording is off unless
asked for: it keeps tokens * layers * k * 4 bytes in host memory.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoe_core.errors import DataError
from emoe_core.experts.step import StepContext

FORMAT = 1
COLUMNS = {
    "request": "int32",
    "position": "int32",
    "prefill": "bool",
    "chosen": "uint16",
    "served": "uint16",
    "weight": "float16",
}
# How a choice was served, in the terms of `emoe_core/metrics.py`: the values of `RoutingTrace.outcome`.
HIT, LOAD, REROUTE, DROP = range(4)
MAX_EXPERTS = 1 << 16
# Recorded routing packs 2 to 20 times smaller.
MAX_RATIO = 200


@dataclass(frozen=True)
class RoutingTrace:
    """Routing of n tokens through L MoE layers with k choices of E experts.

    Attributes
    ----------
    request : int32 [n]
        Request id.
    position : int32 [n]
        Position in the request's sequence, padding excluded.
    prefill : bool [n]
        Whether the token was part of a prompt.
    chosen, served : uint16 [n, L, k]
        Experts the router wanted, and those that computed; where a choice was dropped, any, with weight 0.
    weight : float16 [n, L, k]
        Router weights of the chosen experts.
    tasks : dict
        Task type of each request id.
    experts : int
        E.
    outcome : uint8 [n, L, k] or None
        How each choice was served: `HIT`, `LOAD`, `REROUTE` or `DROP`. None where nobody knows (a trace made
        otherwise).
    """

    request: np.ndarray
    position: np.ndarray
    prefill: np.ndarray
    chosen: np.ndarray
    served: np.ndarray
    weight: np.ndarray
    tasks: dict[int, str]
    experts: int
    outcome: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.request)

    def counts(self, request: int | None = None) -> np.ndarray:
        """Return how many tokens of a request (of all when missing) chose each expert, float64 [L, E]."""
        chosen = self.chosen if request is None else self.chosen[self.request == request]
        layers = chosen.shape[1]
        return np.stack(
            [np.bincount(chosen[:, layer].ravel(), minlength=self.experts) for layer in range(layers)]
        ).astype(float)

    def shares(self) -> dict[int, np.ndarray]:
        """Return per request the share of its (token, choice) pairs per expert, float64 [L, E], rows summing to 1."""
        result = {}
        for request in np.unique(self.request):
            counts = self.counts(int(request))
            result[int(request)] = counts / counts.sum(axis=1, keepdims=True)
        return result

    def save(self, path: Path) -> Path:
        """Write the trace as compressed npz."""
        known: dict[str, Any] = {} if self.outcome is None else {"outcome": self.outcome}
        names = np.array([f"{key}\t{task}" for key, task in self.tasks.items()], dtype=np.str_)
        with Path(path).open("wb") as stream:
            np.savez_compressed(
                stream,
                format=np.array(FORMAT),
                request=self.request,
                position=self.position,
                prefill=self.prefill,
                chosen=self.chosen,
                served=self.served,
                weight=self.weight,
                tasks=names,
                experts=np.array(self.experts),
                **known,
            )
        return Path(path)

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Read a trace; DataError when the file is not a whole trace of this format."""
        try:
            _check_size(Path(path))
            with np.load(path, allow_pickle=False) as data:
                if int(data["format"]) != FORMAT:
                    raise DataError(f"{path} is a trace of format {int(data['format'])}, this version reads {FORMAT}")
                tasks = {int(key): task for key, task in (str(item).split("\t", 1) for item in data["tasks"])}
                columns = {name: data[name] for name in COLUMNS}
                outcome = data.get("outcome")
                trace = cls(**columns, tasks=tasks, experts=int(data["experts"]), outcome=outcome)
        except DataError:
            raise
        except Exception as error:  # a damaged archive raises many unrelated types
            raise DataError(f"{path} is not a readable routing trace ({error}): record it again") from error
        wrong = [name for name, dtype in COLUMNS.items() if columns[name].dtype != dtype]
        if wrong:
            raise DataError(f"{path} is damaged: its column {wrong[0]} is no {COLUMNS[wrong[0]]}. Record it again.")
        shape = trace.chosen.shape
        by_token = {trace.request.shape, trace.position.shape, trace.prefill.shape}
        if len(shape) != 3 or {trace.weight.shape, trace.served.shape} != {shape} or by_token != {shape[:1]}:
            raise DataError(f"{path} is damaged: its columns disagree in length. Record it again.")
        if outcome is not None and (
            outcome.dtype != "uint8" or outcome.shape != shape or (outcome.size and outcome.max() > DROP)
        ):
            raise DataError(f"{path} is damaged: its outcomes are not those of its choices. Record it again.")
        if not 0 < trace.experts <= MAX_EXPERTS or not all(shape[1:]):
            raise DataError(f"{path} is damaged: it has no experts or choices. Record it again.")
        if len(trace) and max(int(trace.chosen.max()), int(trace.served.max())) >= trace.experts:
            raise DataError(f"{path} is damaged: it names an expert beyond its {trace.experts}. Record it again.")
        return trace


def _check_size(path: Path) -> None:
    """Raise ValueError when the archive unpacks to more than any trace would: a few bytes can stand for gigabytes."""
    with zipfile.ZipFile(path) as archive:
        unpacked_bytes = sum(member.file_size for member in archive.infolist())
    if unpacked_bytes > MAX_RATIO * path.stat().st_size:
        raise ValueError(f"it unpacks to {unpacked_bytes:,} bytes, more than {MAX_RATIO} times its size")


class TraceRecorder:
    """Collects what the layers of one engine report, pass by pass."""

    def __init__(self, layers: int, experts: int) -> None:
        self.layers = layers
        self.experts = experts
        self._pending: dict[int, dict[str, np.ndarray]] = {}
        self._parts: list[dict[str, np.ndarray]] = []
        self._tasks: dict[int, str] = {}
        self._next_position: dict[int, int] = {}

    def layer(
        self,
        layer: int,
        chosen: torch.Tensor,
        weight: torch.Tensor,
        served: torch.Tensor,
        absent: Sequence[int] = (),
        replaced: torch.Tensor | None = None,
        became: int = REROUTE,
    ) -> None:
        """Take one layer's choice of the current pass: tensors [tokens, k].

        ``absent`` are the experts that had no slot when the layer was reached, ``replaced`` (bool) the choices given
        up, and ``became`` what they are, `REROUTE` or `DROP`; what else was absent was loaded.
        """
        outcome = np.isin(chosen.cpu().numpy(), list(absent)).astype(np.uint8) * LOAD
        if replaced is not None:
            outcome[replaced.cpu().numpy()] = became
        self._pending[layer] = {
            "chosen": chosen.cpu().numpy().astype(np.uint16),
            "weight": weight.detach().float().cpu().numpy().astype(np.float16),
            "served": served.cpu().numpy().astype(np.uint16),
            "outcome": outcome.astype(np.uint8),
        }

    def end_of_pass(self, step: StepContext) -> None:
        """Keep the pass if every layer reported it with the pass's number of tokens; forget it otherwise."""
        pending, self._pending = self._pending, {}
        if len(pending) != self.layers or any(len(part["chosen"]) != step.tokens for part in pending.values()):
            return
        real = np.ones(step.tokens, dtype=bool) if step.real is None else step.real.numpy()
        rows = step.row_of_token().numpy()
        position = np.zeros(step.tokens, dtype=np.int32)
        for row, request in enumerate(step.requests):
            number, here = request.engine_number, (rows == row) & real
            first = self._next_position.get(number, 0)
            position[here] = first + np.arange(int(here.sum()))
            self._next_position[number] = first + int(here.sum())
            self._tasks[number] = request.task
        stacked = {
            name: np.stack([pending[layer][name] for layer in range(self.layers)], axis=1)[real] for name in pending[0]
        }
        self._parts.append(
            {
                "request": np.asarray(step.numbers, dtype=np.int32)[rows][real],
                "position": position[real],
                "prefill": np.full(int(real.sum()), step.is_prefill),
                **stacked,
            }
        )

    def clear(self) -> None:
        """Forget everything recorded so far."""
        self._pending, self._parts, self._tasks, self._next_position = {}, [], {}, {}

    def trace(self) -> RoutingTrace:
        """Return everything recorded so far; DataError when nothing was."""
        if not self._parts:
            raise DataError("no routing was recorded: run a prompt first")
        columns = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        return RoutingTrace(**columns, tasks=dict(self._tasks), experts=self.experts)
