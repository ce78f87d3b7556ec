"""What Prometheus reads: experts, queue, latencies, objectives met. A registry of its own for each engine.

A request has an objective when its ``slo`` promised something; it is met when both its time to first token (from
arrival) and its mean time per further token stay within it. Cancelled and failed requests are counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emoe_core.metrics import Counters
from emoe_core.scheduler import Objective
from emoe_core.serving.records import Answer

TTFT_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
TPOT_BUCKETS_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class ServerMetrics(Collector):
    """Counters of one engine's service; `publish`, `answered` and `ended` are called by its worker."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._state = (Counters(), 0, 0)
        self._ended = Counter("emoe_requests", "Requests that ended.", ["result"], registry=self._registry)
        self._slo = Counter("emoe_slo_requests", "Requests with an objective.", ["met"], registry=self._registry)
        self._tokens = Counter("emoe_output_tokens", "Tokens of finished answers.", registry=self._registry)
        self._ttft = Histogram(
            "emoe_ttft_seconds", "Arrival to first token.", buckets=TTFT_BUCKETS_S, registry=self._registry
        )
        self._tpot = Histogram(
            "emoe_tpot_seconds", "Mean time of a further token.", buckets=TPOT_BUCKETS_S, registry=self._registry
        )
        for result in ("finished", "failed", "cancelled"):
            self._ended.labels(result)
        for met in ("true", "false"):
            self._slo.labels(met)
        self._registry.register(self)

    def publish(self, counters: Counters, waiting: int, running: int) -> None:
        """Take the state after a turn; counters are a copy that nobody changes."""
        self._state = (counters, waiting, running)

    def answered(self, answer: Answer, objective: Objective) -> None:
        """Count a finished request."""
        self.ended("finished")
        further = len(answer.token_ids) - 1
        ttft_s = answer.first_token_s - answer.arrival_s
        tpot_s = (answer.finished_s - answer.first_token_s) / further if further else None
        self._tokens.inc(further + 1)
        self._ttft.observe(ttft_s)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)
        if math.isfinite(objective.ttft_s) or math.isfinite(objective.tpot_s):
            met = ttft_s <= objective.ttft_s and (tpot_s or 0.0) <= objective.tpot_s
            self._slo.labels("true" if met else "false").inc()

    def ended(self, result: str) -> None:
        """Count the end of a request: "finished", "failed" or "cancelled"."""
        self._ended.labels(result).inc()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def families(self) -> list[Metric]:
        """Return everything as it can be sent to another process."""
        return list(self._registry.collect())

    def collect(self) -> Iterator[Metric]:
        """Yield what the engine counts; called by the registry."""
        counters, waiting, running = self._state
        yield GaugeMetricFamily("emoe_queue_length", "Requests that wait to be admitted.", waiting)
        yield GaugeMetricFamily("emoe_running_requests", "Requests in the batch.", running)
        yield GaugeMetricFamily("emoe_expert_hit_rate", "Expert hits per expert lookup since start.", counters.hit_rate)
        counts = {
            "emoe_expert_lookups": counters.lookups,
            "emoe_expert_hits": counters.hits,
            "emoe_expert_loads": counters.loads,
            "emoe_expert_reroutes": counters.reroutes,
            "emoe_expert_drops": counters.drops,
            "emoe_expert_prefetches": counters.prefetches,
            "emoe_expert_bytes_loaded": counters.bytes_loaded,
            "emoe_expert_stall_seconds": counters.stall_s,
            "emoe_forward_passes": counters.forwards,
        }
        for name, value in counts.items():
            yield CounterMetricFamily(name, "See emoe_core.metrics.", value)
