"""The emoe engine decoding given tokens: one request for each sequence, with the engine's own counters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import emoe_core
from emoe_core.experts.trace import RoutingTrace
from emoe_core.planning.tasks import UNKNOWN
from emoe_core.scheduler import Request
from workbench.systems.option_names import resolve_options
from workbench.systems.stock import TorchDecoder


class EngineDecoder(TorchDecoder):
    """Options are those of `resolve_options`; ``spec["warm_trace"]`` is a file that a predictor is taught.

    Where every expert has a slot all are loaded at once; the counters ``fill_bytes`` and ``fill_s`` say how fast.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        name = spec.get("device", "cpu")
        self.engine = emoe_core.load(
            spec["checkpoint"], device=name, dtype=spec["dtype"], **resolve_options(spec["options"])
        )
        super().__init__(self.engine.device)
        self.model = self.engine.model
        self._request: list[Request] = []
        started = time.perf_counter()
        self.engine.load_all()
        self._filled_s = time.perf_counter() - started
        self._filled_bytes = self.engine.stats().counters.bytes_loaded
        if spec.get("warm_trace"):
            self.engine.warm_start(RoutingTrace.load(Path(spec["warm_trace"])))

    def prefill(self, token_ids: Sequence[int]) -> int:
        self._end_request()
        self._request = self.engine.admit([UNKNOWN], [len(token_ids)])
        return super().prefill(token_ids)

    def counters(self) -> dict[str, float]:
        filled = {"fill_bytes": float(self._filled_bytes), "fill_s": self._filled_s} if self._filled_bytes else {}
        waited = {"host_waits": float(self.engine.host_waits)}
        counters = self.engine.stats().counters
        return {**asdict(counters), "slot_bytes": float(self.engine.loader.slot_bytes), **filled, **waited}

    def description(self) -> str:
        config, plan, stats = self.engine.config, self.engine.plan, self.engine.stats()
        slots = f"{min(plan.slots_per_layer)} slots a layer of {plan.num_experts[0]}"
        choice = f"policy {stats.policy}, predictor {stats.predictor}"
        storage = self.engine.loader.storage.description
        return f"emoe, {slots}, tolerance {config.tolerance:g}, {choice}; {storage}"

    def close(self) -> None:
        self._end_request()
        self.engine.close()
        super().close()

    def _end_request(self) -> None:
        request, self._request = self._request, []
        if request:
            self.engine.finish(request)
