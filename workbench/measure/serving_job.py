"""One measured process: runs a configuration given as JSON, and writes what it needed as JSON.

Started by `memory.py` as ``python -m workbench.measure.serving_job SPEC RESULT``; nothing else runs in the process, so
its peak memory is the configuration's. It measures; it does not subtract, compare or record.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import emoe_core
from emoe_core.cpu_memory import return_free_memory
from emoe_core.errors import EmoeError, ExperimentError
from emoe_core.experts.trace import RoutingTrace
from workbench.machine.busy import OtherWork
from workbench.machine.process_counters import status_bytes
from workbench.systems.option_names import resolve_options

if TYPE_CHECKING:
    import torch

STOCK = "stock"
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)$")


def process_peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes (VmHWM)."""
    peak_bytes = status_bytes("VmHWM")
    if peak_bytes is not None:
        return peak_bytes
    raise ExperimentError("this operating system does not report peak memory (no VmHWM in /proc/self/status)")


def mapped_checkpoint_bytes(folder: Path, model: torch.nn.Module) -> int:
    """Return the resident bytes of a checkpoint's files that a process still maps but that no weight needs.

    Weights that were copied while loading leave their file's pages mapped as long as one weight of the same file is
    a view of it. They count in the peak, but the system drops them when memory is short.
    """
    found, place = 0, None
    addresses: list[tuple[int, int]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapping = _MAPPING.match(line)
        if mapping:
            place = mapping if Path(mapping[3]).resolve().is_relative_to(folder.resolve()) else None
            if place is not None:
                addresses.append((int(place[1], 16), int(place[2], 16)))
        elif re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            place = None
        elif place is not None and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    views = {weight.data_ptr(): weight.nbytes for weight in model.state_dict(keep_vars=True).values()}
    needed = sum(size for at, size in views.items() if any(low <= at < high for low, high in addresses))
    return max(0, found - needed)


def reset_peak() -> bool:
    """Start this process's peak anew from what is resident now; False where the kernel does not allow it.

    What loading freed goes back to the system first, so that the C library's heap does not count as the model's.
    """
    gc.collect()
    return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _run_emoe(spec: dict[str, Any]) -> dict[str, Any]:
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


def _run_stock(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from emoe_core.checkpoint.index import open_checkpoint
    from emoe_core.errors import OptionError
    from emoe_core.generation import TokenWatch, encode
    from emoe_core.tokenizer import load_tokenizer

    options = spec["options"]
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        spec["checkpoint"], dtype=options.get("dtype", "auto"), experts_implementation="eager"
    ).eval()
    device = options.get("device", "auto")
    model.to("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    tokenizer = load_tokenizer(spec["checkpoint"])
    if tokenizer is None:
        raise OptionError(f"{spec['checkpoint']} has no tokenizer: save one beside the weights")
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


def _main(source: Path, target: Path) -> int:
    spec = json.loads(source.read_text())
    stock = spec["options"].get("implementation") == STOCK
    kept = None
    if spec.get("tokenizer"):
        from emoe_core.tokenizer import load_tokenizer

        kept = load_tokenizer(spec["tokenizer"])
    try:
        result = _run_stock(spec) if stock else _run_emoe(spec)
    except EmoeError as error:
        print(error, file=sys.stderr)
        return 2
    import torch

    result["device_peak_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    result["serving_peak_bytes"] = process_peak_bytes()
    result["peak_bytes"] = max(result["serving_peak_bytes"], result["load_peak_bytes"])
    del kept
    target.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
