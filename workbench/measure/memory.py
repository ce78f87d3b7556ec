"""Measured memory and speed of one configuration, in a fresh process.

The peak (`peak_memory.py`) is of a process that did nothing else, once over its life and once from the moment the model
was ready. From it the peak of a *control* process is subtracted, which has the same imports and the same tokenizer and
runs a tiny model the same way, so that what remains is the model's. On CUDA the allocator's peak stands beside it.

Times come from the same process: prompts one after the other, one warm-up prompt first. Whether reads went past the
page cache is stated; with direct reads the file's cached pages do not matter. Where other processes took more than
a part of the machine meanwhile, times are not to be trusted (`machine/busy.py`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import ExperimentError
from emoe_core.experts.trace import RoutingTrace
from emoe_core.files import write_whole
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.loader.pack import ensure_pack
from workbench.measure.launch import launch
from workbench.measure.result_cache import result_file
from workbench.measure.serving_job import STOCK


@dataclass(frozen=True)
class MemoryMeasurement:
    """What a fresh process needed.

    Attributes
    ----------
    peak_bytes : int
        Peak resident memory of the process (VmHWM).
    control_bytes : int
        The same of the control process.
    load_peak_bytes : int
        Peak until the model was ready.
    serving_peak_bytes : int
        Peak from then on; the whole life's where the kernel does not let a process reset its peak.
    serving_control_bytes : int
        The same of the control process.
    mapped_bytes : int
        Of the serving peak, pages of the checkpoint's files that stayed mapped after their weights were copied: the
        system drops them when memory is short.
    device_peak_bytes : int
        CUDA allocator's peak; 0 on the CPU.
    slot_bytes, dense_bytes : int
        Terms as computed, to be held against the peak.
    load_s : float
        Seconds to load (the pack already written).
    ttft_s, ttft_spread_s, tpot_s, tpot_spread_s : float
        Median over prompts, and the distance of the quartiles.
    others_cpu_share : float
        Share of the machine's processor time that other processes took meanwhile.
    stall_share : float
        Share of the timed seconds that the model waited for experts.
    bytes_loaded, tokens : int
        Expert bytes read during the timed prompts, and their tokens in and out.
    hit_rate : float
        Hits per lookup during the timed prompts.
    page_cache : str
        "bypassed (direct reads)" or why not.
    """

    peak_bytes: int
    control_bytes: int
    load_peak_bytes: int
    serving_peak_bytes: int
    serving_control_bytes: int
    mapped_bytes: int
    device_peak_bytes: int
    slot_bytes: int
    dense_bytes: int
    load_s: float
    ttft_s: float
    ttft_spread_s: float
    tpot_s: float
    tpot_spread_s: float
    others_cpu_share: float
    stall_share: float
    bytes_loaded: int
    tokens: int
    hit_rate: float
    page_cache: str

    @property
    def model_bytes(self) -> int:
        """Peak memory that the model is responsible for: the process's peak minus the control's."""
        return self.peak_bytes - self.control_bytes

    @property
    def serving_bytes(self) -> int:
        """Peak memory that the model needs once it is loaded: without pages that the system may drop at no cost."""
        return self.serving_peak_bytes - self.serving_control_bytes - self.mapped_bytes


def measure(
    checkpoint: str | Path,
    prompts: Sequence[str],
    tasks: Sequence[str],
    *,
    max_new_tokens: int = 32,
    options: dict[str, Any] | None = None,
    warm_trace: RoutingTrace | None = None,
) -> MemoryMeasurement:
    """Run prompts in a fresh process and report its memory and times.

    Parameters
    ----------
    checkpoint : str or Path
    prompts, tasks : sequence of str
        At least two; the first is the warm-up.
    max_new_tokens : int
    options : dict, optional
        Options of `emoe_core.load` (JSON values), or {"implementation": "stock"} for transformers' own loading with
        all experts resident.
    warm_trace : RoutingTrace, optional
        Routing that the predictor learns from first.
    """
    if len(prompts) < 2:
        raise ExperimentError("measuring needs at least two prompts: one to warm up, one to time")
    spec = {
        "checkpoint": str(checkpoint),
        "prompts": list(prompts),
        "tasks": list(tasks),
        "max_new_tokens": max_new_tokens,
        "options": options or {},
        "warm_trace": None,
    }
    with tempfile.TemporaryDirectory() as scratch:
        if warm_trace is not None:
            spec["warm_trace"] = str(warm_trace.save(Path(scratch) / "trace.npz"))
        result = _served(spec)
    control = _control(spec)
    known = {item.name for item in fields(MemoryMeasurement)}
    assert set(result) | {"control_bytes", "serving_control_bytes"} == known, set(result) ^ known
    return MemoryMeasurement(
        **result, control_bytes=control["peak_bytes"], serving_control_bytes=control["serving_peak_bytes"]
    )


def _served(spec: dict[str, Any]) -> dict[str, Any]:
    """Run a spec of `serving_job.py`, with its pack written: loading is not to be measured while one is made."""
    options = spec["options"]
    if options.get("implementation") != STOCK:
        index = open_checkpoint(spec["checkpoint"], options.get("dtype", "auto"))
        ensure_pack(index.with_expert_dtype(options.get("expert_dtype", "auto")), cache_dir() / "packs")
    return launch("workbench.measure.serving_job", spec).answer("the measuring process failed")


def _control(spec: dict[str, Any]) -> dict[str, int]:
    """Measure the control process, or take what it needed before with the same libraries, code and tokenizer."""
    kept = {"implementation", "device"}
    options = {name: value for name, value in spec["options"].items() if name in kept} | {"dtype": "float32"}
    tokenizer = spec["checkpoint"]
    stored = result_file("controls", {"options": options, "tokenizer": tokenizer})
    if not stored.exists():
        from workbench.models.reference.tiny import cached_tiny_moe

        tiny = {"checkpoint": str(cached_tiny_moe()), "options": options, "tokenizer": tokenizer, "warm_trace": None}
        result = _served({**spec, **tiny})
        write_whole(stored, json.dumps({name: result[name] for name in ("peak_bytes", "serving_peak_bytes")}))
    return dict(json.loads(stored.read_text()))


def as_metrics(measured: MemoryMeasurement) -> dict[str, float]:
    """Return the numeric fields as metrics, with the derived ``model_bytes`` and ``serving_bytes``."""
    numbers = {name: float(value) for name, value in asdict(measured).items() if not isinstance(value, str)}
    return {
        **numbers,
        "model_bytes": float(measured.model_bytes),
        "serving_bytes": float(measured.serving_bytes),
    }
