"""One measured process: loads a configuration and answers prompts, one after the other.

Started by `memory.py`; nothing else runs in the process, so its peak memory is the configuration's. It measures; it
does not subtract, compare or record.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import emoe_core
from emoe_core.config import resolve_device
from emoe_core.experts.trace import RoutingTrace
from workbench.machine.busy import OtherWork
from workbench.measure.job import answer_job
from workbench.measure.peak_memory import (
    device_peak_bytes,
    mapped_checkpoint_bytes,
    process_peak_bytes,
    reset_peak,
)
from workbench.systems.option_names import resolve_options

STOCK = "stock"


def serve(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer a spec of `memory.py` and return what it needed."""
    kept = None
    if spec.get("tokenizer"):
        from emoe_core.generation import load_tokenizer

        # A control process has the tokenizer of the model that it is held against.
        kept = load_tokenizer(spec["tokenizer"])
    found = _serve_stock(spec) if spec["options"].get("implementation") == STOCK else _serve_emoe(spec)
    found["device_peak_bytes"] = device_peak_bytes(resolve_device(spec["options"].get("device", "auto")))
    found["serving_peak_bytes"] = process_peak_bytes()
    del kept
    return found


def _serve_emoe(spec: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    options = {name: value for name, value in spec["options"].items() if name != "implementation"}
    with emoe_core.load(spec["checkpoint"], **resolve_options(options)) as engine:
        if spec["warm_trace"]:
            engine.warm_start(RoutingTrace.load(Path(spec["warm_trace"])))
        load_s, load_peak_bytes = time.perf_counter() - started, process_peak_bytes()
        reset_peak()
        ask = {"max_new_tokens": spec["max_new_tokens"]}
        engine.generate(spec["prompts"][:1], spec["tasks"][:1], **ask)
        before = engine.stats().counters
        others, begun = OtherWork(), time.perf_counter()
        answers = engine.generate(spec["prompts"][1:], spec["tasks"][1:], **ask)
        timed_s = time.perf_counter() - begun
        others_share = others.share()
        counters = engine.stats().counters.since(before)
        storage = engine.loader.storage
        direct = bool(getattr(storage, "direct", False))
        return {
            **_times([answer.ttft_s for answer in answers], [answer.tpot_s for answer in answers]),
            "others_cpu_share": others_share,
            "load_s": load_s,
            "load_peak_bytes": load_peak_bytes,
            "mapped_bytes": 0,
            "slot_bytes": engine.loader.slot_bytes,
            "dense_bytes": engine.index.dense_bytes_total,
            "stall_share": counters.stall_s / timed_s,
            "bytes_loaded": counters.bytes_loaded,
            "tokens": sum(answer.prompt_tokens + len(answer.token_ids) for answer in answers),
            "hit_rate": counters.hit_rate,
            "page_cache": "bypassed (direct reads)" if direct else storage.description,
        }


def _serve_stock(spec: dict[str, Any]) -> dict[str, Any]:
    from emoe_core.checkpoint.index import open_checkpoint
    from emoe_core.generation import TokenWatch, encode
    from workbench.systems.stock import load_stock, required_tokenizer

    options = spec["options"]
    started = time.perf_counter()
    device = resolve_device(options.get("device", "auto"))
    model = load_stock(spec["checkpoint"], options.get("dtype", "auto")).to(device)
    tokenizer = required_tokenizer(spec["checkpoint"])
    load_s, load_peak_bytes = time.perf_counter() - started, process_peak_bytes()
    reset_peak()
    ttft, tpot, tokens = [], [], []
    others = OtherWork()
    for place, prompt in enumerate(spec["prompts"]):
        if place == 1:
            others = OtherWork()
        ids = torch.tensor([encode(tokenizer, prompt)], device=model.device)
        watch, started = TokenWatch(tokenizer, set()), time.perf_counter()
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=spec["max_new_tokens"],
                do_sample=False,
                stopping_criteria=[watch],
            )
        ttft.append(watch.times[0] - started)
        tpot.append((watch.times[-1] - watch.times[0]) / (len(watch.times) - 1) if len(watch.times) > 1 else None)
        tokens.append(output.shape[1])
    others_share = others.share()
    index = open_checkpoint(spec["checkpoint"], options.get("dtype", "auto"))
    return {
        **_times(ttft[1:], tpot[1:]),
        "others_cpu_share": others_share,
        "load_s": load_s,
        "load_peak_bytes": load_peak_bytes,
        "mapped_bytes": mapped_checkpoint_bytes(Path(spec["checkpoint"]), model),
        "slot_bytes": index.expert_bytes_total,
        "dense_bytes": index.dense_bytes_total,
        "stall_share": 0.0,
        "bytes_loaded": 0,
        "tokens": sum(tokens[1:]),
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


if __name__ == "__main__":
    sys.exit(answer_job(serve))
