"""Measured memory and speed of one configuration, in a fresh process.

The peak is the operating system's: ``VmHWM`` of a process that did nothing else (``ru_maxrss`` would survive ``exec``
and is not used). From it the peak of a *control* process is subtracted, which has the same imports and runs a tiny
model the same way, so that what remains is the model's. On CUDA the allocator's peak stands beside it.

Times come from the same process: prompts one after the other, one warm-up prompt first. Whether reads went past the
page cache is stated; with direct reads the file's cached pages do not matter.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from emoe_core.cache import cache_dir
from emoe_core.errors import EmoeError, ExperimentError
from emoe_core.routing import RoutingTrace

STOCK = "stock"


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
    device_peak_bytes : int
        CUDA allocator's peak; 0 on the CPU.
    slot_bytes, dense_bytes : int
        Terms as computed, to be held against the peak.
    load_s : float
        Seconds to load (the pack already written).
    ttft_s, ttft_spread_s, tpot_s, tpot_spread_s : float
        Median over prompts, and the distance of the quartiles.
    stall_share : float
        Share of the timed seconds that the model waited for experts.
    bytes_loaded, tokens : int
        Expert bytes read during the timed prompts, and their tokens in and out.
    hit_rate : float
        Hits per request during the timed prompts.
    page_cache : str
        "bypassed (direct reads)" or why not.
    """

    peak_bytes: int
    control_bytes: int
    load_peak_bytes: int
    device_peak_bytes: int
    slot_bytes: int
    dense_bytes: int
    load_s: float
    ttft_s: float
    ttft_spread_s: float
    tpot_s: float
    tpot_spread_s: float
    stall_share: float
    bytes_loaded: int
    tokens: int
    hit_rate: float
    page_cache: str

    @property
    def model_bytes(self) -> int:
        """Peak memory that the model is responsible for: the process's peak minus the control's."""
        return self.peak_bytes - self.control_bytes


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
    }
    result = _child(spec, warm_trace)
    control = _child({**spec, "checkpoint": str(_tiny_checkpoint()), "options": _control(options)})
    known = {item.name for item in fields(MemoryMeasurement)}
    assert set(result) | {"control_bytes"} == known, set(result) ^ known
    return MemoryMeasurement(**result, control_bytes=int(control["peak_bytes"]))


def process_peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ExperimentError("this operating system does not report peak memory (no VmHWM in /proc/self/status)")


def _control(options: dict[str, Any] | None) -> dict[str, Any]:
    kept = {"implementation", "device", "dtype"}
    return {name: value for name, value in (options or {}).items() if name in kept} | {"dtype": "float32"}


def _tiny_checkpoint() -> Path:
    from workbench.reference_model.tiny import tiny_moe

    path = cache_dir() / "tiny-control"
    return path if (path / "config.json").exists() else tiny_moe(path, family="mixtral", seed=0)


def _child(spec: dict[str, Any], warm_trace: RoutingTrace | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        trace = None if warm_trace is None else str(warm_trace.save(Path(scratch) / "trace.npz"))
        spec = {**spec, "warm_trace": trace}
        source, target = Path(scratch) / "spec.json", Path(scratch) / "result.json"
        source.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "workbench.memory", str(source), str(target)]
        finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "EMOE_RUN_ID": ""})
        if finished.returncode != 0 or not target.exists():
            last = finished.stderr.strip().splitlines()[-1:] or [f"exit code {finished.returncode}"]
            raise ExperimentError(f"the measuring process failed: {last[0]}")
        return dict(json.loads(target.read_text()))


def _run_emoe(spec: dict[str, Any]) -> dict[str, Any]:
    import time

    import emoe_core

    started = time.perf_counter()
    options = {name: value for name, value in spec["options"].items() if name != "implementation"}
    with emoe_core.load(spec["checkpoint"], **options) as engine:
        if spec["warm_trace"]:
            engine.warm_start(RoutingTrace.load(Path(spec["warm_trace"])))
        load_s, load_peak_bytes = time.perf_counter() - started, process_peak_bytes()
        ask = {"max_new_tokens": spec["max_new_tokens"]}
        engine.generate(spec["prompts"][:1], spec["tasks"][:1], **ask)
        before = engine.stats().counters
        begun = time.perf_counter()
        answers = engine.generate(spec["prompts"][1:], spec["tasks"][1:], **ask)
        timed_s = time.perf_counter() - begun
        counters = engine.stats().counters.since(before)
        storage = engine.loader.storage
        direct = bool(getattr(storage, "direct", False))
        return {
            **_times([answer.ttft_s for answer in answers], [answer.tpot_s for answer in answers]),
            "load_s": load_s,
            "load_peak_bytes": load_peak_bytes,
            "slot_bytes": engine.loader.slot_bytes,
            "dense_bytes": engine.index.dense_bytes_total,
            "stall_share": counters.stall_s / timed_s,
            "bytes_loaded": counters.bytes_loaded,
            "tokens": sum(answer.prompt_tokens + len(answer.token_ids) for answer in answers),
            "hit_rate": counters.hit_rate,
            "page_cache": "bypassed (direct reads)" if direct else storage.description,
        }


def _run_stock(spec: dict[str, Any]) -> dict[str, Any]:
    import time

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emoe_core.checkpoint import open_checkpoint
    from emoe_core.generation import encode

    options = spec["options"]
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        spec["checkpoint"], dtype=options.get("dtype", "auto"), experts_implementation="eager"
    ).eval()
    device = options.get("device", "auto")
    model.to("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(spec["checkpoint"])
    load_s, load_peak_bytes = time.perf_counter() - started, process_peak_bytes()
    ttft, tpot, tokens = [], [], 0
    for prompt in spec["prompts"]:
        ids = torch.tensor([encode(tokenizer, prompt)], device=model.device)
        moments = [time.perf_counter()]

        def note(input_ids: torch.Tensor, scores: Any, moments: list[float] = moments, **_: Any) -> torch.Tensor:
            moments.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=spec["max_new_tokens"],
                do_sample=False,
                stopping_criteria=[note],
            )
        ttft.append(moments[1] - moments[0])
        tpot.append((moments[-1] - moments[1]) / (len(moments) - 2) if len(moments) > 2 else None)
        tokens += output.shape[1]
    index = open_checkpoint(spec["checkpoint"], options.get("dtype", "auto"))
    return {
        **_times(ttft[1:], tpot[1:]),
        "load_s": load_s,
        "load_peak_bytes": load_peak_bytes,
        "slot_bytes": index.expert_bytes_total,
        "dense_bytes": index.dense_bytes_total,
        "stall_share": 0.0,
        "bytes_loaded": 0,
        "tokens": tokens,
        "hit_rate": 1.0,
        "page_cache": "not used after loading",
    }


def _times(ttft: Sequence[float], tpot: Sequence[float | None]) -> dict[str, float]:
    known = [value for value in tpot if value is not None]
    return {
        "ttft_s": statistics.median(ttft),
        "ttft_spread_s": _spread(ttft),
        "tpot_s": statistics.median(known) if known else float("nan"),
        "tpot_spread_s": _spread(known),
    }


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[2] - quartiles[0]


def _main(source: Path, target: Path) -> int:
    spec = json.loads(source.read_text())
    stock = spec["options"].get("implementation") == STOCK
    try:
        result = _run_stock(spec) if stock else _run_emoe(spec)
    except EmoeError as error:
        print(error, file=sys.stderr)
        return 2
    import torch

    result["device_peak_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    result["peak_bytes"] = process_peak_bytes()
    target.write_text(json.dumps(result))
    return 0


def as_metrics(measured: MemoryMeasurement) -> dict[str, float]:
    """Return the numeric fields as metrics, with the derived ``model_bytes``."""
    numbers = {name: float(value) for name, value in asdict(measured).items() if not isinstance(value, str)}
    return {**numbers, "model_bytes": float(measured.model_bytes)}


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
