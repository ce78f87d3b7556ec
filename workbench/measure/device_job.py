"""One measured process on a device: what `decode_job.py` measures, and what only a device makes worth knowing.

After the timed tokens: the time to the first token of a long prompt, the peak of the device's allocator, how fast plain
copies from pinned memory are, and a profile of a few decode steps, with the calls in them that make the host wait.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from workbench.measure.decode_job import measure
from workbench.measure.job import answer_job
from workbench.systems.decoder import Decoder

# Calls of CUDA's runtime, as PyTorch's profiler names them, in which a thread of the host waits for the device.
WAITS = ("cudaDeviceSynchronize", "cudaEventSynchronize", "cudaStreamSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
PROFILE_ROWS = 25


def measure_on_device(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer a spec of `workbench.bench.device_point`; modules in ``joins`` make devices known first."""
    for module in spec["joins"]:
        importlib.import_module(module)
    return measure(spec, partial(beyond_decoding, spec=spec))


def beyond_decoding(decoder: Decoder, spec: dict[str, Any]) -> dict[str, Any]:
    """Return what is measured after the timed tokens."""
    from emoe_core.config import resolve_device
    from workbench.measure.peak_memory import device_peak_bytes

    device = resolve_device(spec["device"])
    counters = decoder.counters()
    found: dict[str, Any] = {name: counters[name] for name in ("fill_bytes", "fill_s") if name in counters}
    found["device_peak_bytes"] = device_peak_bytes(device)
    # Twice: the first prompt of a length also pays for what libraries choose or load for its shapes.
    for _ in range(2):
        started = time.perf_counter()
        decoder.prefill(spec["long_prompt"])
        found["long_ttft_s"] = time.perf_counter() - started
    found["long_device_peak_bytes"] = device_peak_bytes(device)
    decoder.prefill(spec["prompt"])
    found |= profiled_steps(decoder, spec["timed"][: spec["profiled_tokens"]], device.type == "cuda")
    return found | {"memcpy_bytes_per_s": copy_rate(device)}


def profiled_steps(decoder: Decoder, token_ids: Sequence[int], on_cuda: bool) -> dict[str, Any]:
    """Decode tokens under PyTorch's profiler.

    Returns
    -------
    dict
        ``profile``, rows of the operations that took most time, on the device where there is one; on CUDA also
        ``host_waits_per_token`` and ``launches_per_token``, of all threads of the process.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as seen:
        for token in token_ids:
            decoder.decode(token)
    rows, tokens = seen.key_averages(), len(token_ids)
    table = [
        {
            "operation": row.key,
            "calls_per_token": row.count / tokens,
            "device_us_per_token": row.self_device_time_total / tokens,
            "host_us_per_token": row.self_cpu_time_total / tokens,
        }
        for row in rows
    ]
    table.sort(key=lambda row: -row["device_us_per_token" if on_cuda else "host_us_per_token"])
    found: dict[str, Any] = {"profile": table[:PROFILE_ROWS]}
    if on_cuda:
        for name, calls in (("host_waits_per_token", WAITS), ("launches_per_token", LAUNCHES)):
            found[name] = sum(row.count for row in rows if row.key in calls) / tokens
    return found


def copy_rate(device: Any, size_bytes: int = 2**28, repeats: int = 5) -> float:
    """Return bytes a second of one large copy from (on CUDA pinned) host memory to a device: the best of several."""
    import torch

    on_cuda = device.type == "cuda"
    source = torch.ones(size_bytes, dtype=torch.uint8, pin_memory=on_cuda)
    target = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if on_cuda:
            torch.cuda.synchronize(device)
        best = max(best, size_bytes / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    sys.exit(answer_job(measure_on_device))
