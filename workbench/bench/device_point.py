"""One configuration on a device, measured in a process of its own: what a point of ``sweeps/gpu.yaml`` runs.

The model is a folder or an embedded one, or, given a ``shape``, random weights of a published shape that follow
recorded routing (`workbench.models.synthetic`), written to the cache where they are missing. Token ids are given
beforehand (`forced_tokens.py`); the job is `workbench.measure.device_job`. Where the device is no GPU the run is a
rehearsal: it shows that everything works, and its figures say nothing of a GPU.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.config import EngineConfig
from emoe_core.errors import OptionError, require_known
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.loader.pack import ensure_pack
from workbench.bench.forced_tokens import forced_tokens
from workbench.bench.prepare import Report
from workbench.machine.environment import available_cores
from workbench.measure.launch import launch
from workbench.models.names import resolve_model
from workbench.models.synthetic.shapes import find_shape, scaled
from workbench.models.synthetic.writer import cached_folder, laid_out, write_synthetic
from workbench.replay.recorded_routing import recorded_trace
from workbench.systems.systems import SYSTEMS
from workbench.tracking.findings import Findings

MEASURED_SYSTEMS = ("emoe", "stock-eager", "stock-grouped_mm")
# Devices that join by name when the module that holds them is imported (`emoe_core.device.KINDS`).
SIMULATED = "simulated"
JOINS = {SIMULATED: "workbench.machine.simulated_device"}
DTYPE = "bfloat16"


@dataclass(frozen=True)
class DevicePoint:
    """What is measured; the fields are the parameters of notebook 13.

    Attributes
    ----------
    model : str
        As `resolve_model` takes it; not used where there is a ``shape``.
    shape : str
        Name of `workbench.models.synthetic.shapes`, or empty.
    scale : float
        Share of the shape's published bytes.
    routing : str
        Recorded routing that the shape's weights follow (`recorded_trace`).
    system : str
        One of `MEASURED_SYSTEMS`. Stock systems hold every expert, whatever the next four say.
    budget, tier, tolerance, on_miss, device
        As `EngineConfig`.
    tokens, prompt_tokens, warm_tokens : int
        Decoded and timed; of the prompt whose first token is timed; decoded before, untimed.
    long_prompt_tokens : int
        Of the long prompt whose first token is timed.
    profiled_tokens : int
        Decoded under the profiler, at last.
    max_seconds : float
        Decoding stops after this long.
    seed : int
        Of the weights, and of token ids where the model brings none.
    """

    model: str = "tiny"
    shape: str = ""
    scale: float = 1.0
    routing: str = "reference"
    system: str = "emoe"
    budget: str = "100%"
    tier: str = "host"
    tolerance: float = 0.0
    on_miss: str = "reroute"
    device: str = "auto"
    tokens: int = 128
    prompt_tokens: int = 64
    warm_tokens: int = 16
    long_prompt_tokens: int = 2048
    profiled_tokens: int = 4
    max_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_known(self.system, MEASURED_SYSTEMS, "system")
        for name in ("tokens", "prompt_tokens", "warm_tokens", "long_prompt_tokens", "profiled_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.profiled_tokens > self.tokens:
            raise OptionError(f"profiled_tokens is {self.profiled_tokens}: give at most tokens, {self.tokens}")
        join_device(self.device)
        EngineConfig(**self._of_engine, device=self.device)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the system."""
        options = dict(SYSTEMS[self.system].options)
        if self.system == "emoe":
            options |= self._of_engine
        return options

    @property
    def _of_engine(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("budget", "tier", "tolerance", "on_miss")}


def join_device(name: str) -> list[str]:
    """Make a device known that joins by name, and return the modules that a measured process imports for it.

    Raises
    ------
    OptionError
        When this version has no such device.
    """
    joins = [JOINS[name]] if name in JOINS else []
    for module in joins:
        try:
            __import__(module)
        except ModuleNotFoundError:
            raise OptionError(f"device {name!r} is not there ({module} is missing): use 'cpu' to rehearse") from None
    return joins


def measure_point(point: DevicePoint, report: Report, within_s: float | None = None) -> Findings:
    """Measure a configuration.

    Parameters
    ----------
    point : DevicePoint
    report : callable
        Called with (stage, done, total).
    within_s : float or None
        End what measures after this long, so that a device that is lent for a time gives its records in that time;
        several times ``max_seconds`` if None.

    Returns
    -------
    Findings
        Tables ``speed`` (one row: `metrics_of` what was found), ``token_times`` (seconds of each token) and ``profile``
        (operations of a decode step).

    Raises
    ------
    ExperimentError
        When the process failed.
    OptionError
        When the model's recorded routing is too short, or there is no such device.
    """
    began = time.monotonic()
    checkpoint = _checkpoint(point, report)
    index = open_checkpoint(checkpoint, "auto")
    if point.system == "emoe":
        ensure_pack(index, cache_dir() / "packs", lambda done, total: report("expert pack", done, total))
    vocab = index.config.get_text_config().vocab_size
    forced = forced_tokens(checkpoint, vocab, point.prompt_tokens, point.warm_tokens, point.tokens, point.seed)
    sequences = {name: list(value) for name, value in asdict(forced).items() if name != "source"}
    spec = {
        **sequences,
        "long_prompt": (np.arange(point.long_prompt_tokens) % vocab).tolist(),
        "profiled_tokens": point.profiled_tokens,
        "checkpoint": str(checkpoint),
        "dtype": "auto",
        "adapter": SYSTEMS[point.system].adapter,
        "options": point.options,
        "device": point.device,
        "joins": join_device(point.device),
        "max_seconds": point.max_seconds,
    }
    report("measuring", 0, 1)
    timeout_s = 4 * point.max_seconds + 300
    if within_s is not None:
        timeout_s = max(1.0, min(timeout_s, began + within_s - time.monotonic()))
    found = launch("workbench.measure.device_job", spec, timeout_s=timeout_s).answer(f"{point.system} was not measured")
    report("measuring", 1, 1)
    identity = {"model_hash": index.source_hash, "dtype": str(index.dtype).removeprefix("torch."), "seed": point.seed}
    tables = {
        "speed": pd.DataFrame([metrics_of(found)]),
        "token_times": pd.DataFrame({"token_s": found["token_s"]}),
        "profile": pd.DataFrame(found["profile"]),
    }
    return Findings(tables, identity, 1)


def metrics_of(found: dict[str, Any]) -> dict[str, float]:
    """Return an answer of the job as metrics, by the names of the catalogue; what was not measured is left out."""
    tokens, seconds, counters = found["decoded_tokens"], sum(found["token_s"]), found["counters"]
    metrics = {
        "tokens_per_s": tokens / seconds,
        "tpot_s": float(np.median(found["token_s"])),
        "decode_peak_bytes": found["device_peak_bytes"],
        "device_peak_bytes": found["long_device_peak_bytes"],
    }
    kept = ("ttft_s", "long_ttft_s", "load_s", "memcpy_bytes_per_s", "host_waits_per_token", "launches_per_token")
    metrics |= {name: found[name] for name in (*kept, "slot_bytes", "others_cpu_share") if found.get(name) is not None}
    if counters.get("lookups"):
        metrics |= {
            "hit_rate": counters["hits"] / counters["lookups"],
            "loads": counters["loads"],
            "reroutes": counters["reroutes"],
            "drops": counters["drops"],
            "bytes_loaded": counters["bytes_loaded"],
            "stall_share": counters["stall_s"] / seconds,
        }
    if "host_waits" in counters:
        metrics["engine_waits_per_token"] = counters["host_waits"] / tokens
    if found.get("fill_s"):
        metrics["fill_bytes_per_s"] = found["fill_bytes"] / found["fill_s"]
        metrics["fill_share"] = metrics["fill_bytes_per_s"] / found["memcpy_bytes_per_s"]
    return {name: float(value) for name, value in metrics.items()}


def _checkpoint(point: DevicePoint, report: Report) -> str | Path:
    if not point.shape:
        return resolve_model(point.model)
    shape, label = scaled(find_shape(point.shape), point.scale), f"{point.shape} at scale {point.scale:g}"
    trace, source = recorded_trace(point.routing, lambda done, total: report("recording routing", done, total))
    return write_synthetic(
        cached_folder(label, point.routing, DTYPE, point.seed),
        shape,
        label,
        trace=laid_out(trace, shape),
        trace_source=source,
        dtype=DTYPE,
        seed=point.seed,
        jobs=available_cores(),
        progress=lambda done, total: report("random weights", done, total),
    )
