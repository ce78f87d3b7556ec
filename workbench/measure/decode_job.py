"""One measured process of a bench: load a system, warm it up, then decode the timed sequence token by token.

Started by `decoding.py`; the process does nothing else, imports only what its system needs, and reports what it took:
seconds of each token, bytes that the disk delivered, its peak of memory. Importing libraries is kept apart from
loading.

The sequences: prompt and a few tokens to warm up, then a fresh sequence: its prompt gives the time to the first token
(TTFT), each further pass the time of a token (TPOT). The first prompt's time, with everything cold, is kept beside it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from workbench.machine.busy import OtherWork
from workbench.machine.process_counters import read_bytes, status_bytes
from workbench.measure.job import answer_job
from workbench.systems.decoder import Decoder, decoder_class

# Counters of a system that are reported for the timed tokens alone.
COUNTED = (
    "lookups",
    "hits",
    "loads",
    "reroutes",
    "drops",
    "prefetches",
    "bytes_loaded",
    "wasted_bytes",
    "stall_s",
    "host_waits",
)


def measure(spec: dict[str, Any], more: Callable[[Decoder], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Run a system as a spec of `decoding.measure_decoding` says, and return what it took.

    ``more`` may measure further on the system before it is closed; its answer joins the rest.
    """
    started = time.perf_counter()
    make = decoder_class(spec["adapter"])
    import_s = time.perf_counter() - started
    started, before = time.perf_counter(), read_bytes()
    decoder = make(spec)
    found: dict[str, Any] = {
        "import_s": import_s,
        "load_s": time.perf_counter() - started,
        "load_read_bytes": read_bytes() - before,
        "load_peak_bytes": status_bytes("VmHWM") or 0,
        "description": decoder.description(),
    }
    started = time.perf_counter()
    decoder.prefill(spec["warm_prompt"])
    found["cold_ttft_s"] = time.perf_counter() - started
    decode_until(decoder, spec["warm"], spec["max_seconds"] / 4)

    others = OtherWork()
    started, before = time.perf_counter(), read_bytes()
    likeliest = [decoder.prefill(spec["prompt"])]
    found |= {"ttft_s": time.perf_counter() - started, "prefill_read_bytes": read_bytes() - before}
    counted, before = decoder.counters(), read_bytes()
    chosen, token_s = decode_until(decoder, spec["timed"], spec["max_seconds"])
    counters = decoder.counters()
    found |= {
        "decoded_tokens": len(token_s),
        "token_s": token_s,
        "decode_read_bytes": read_bytes() - before,
        "likeliest": likeliest + chosen,
        "counters": {name: counters[name] - counted[name] for name in COUNTED if name in counters},
        "slot_bytes": counters.get("slot_bytes"),
        "others_cpu_share": others.share(),
        "anonymous_bytes": status_bytes("RssAnon"),
    }
    if more is not None:
        found |= more(decoder)
    decoder.close()
    return found


def decode_until(decoder: Decoder, token_ids: Sequence[int], max_seconds: float) -> tuple[list[int], list[float]]:
    """Decode given tokens, at least one, until the time is over; return likeliest tokens and seconds of each."""
    chosen, token_s = [], []
    started = last = time.perf_counter()
    for token in token_ids:
        chosen.append(decoder.decode(token))
        now = time.perf_counter()
        token_s.append(now - last)
        last = now
        if now - started > max_seconds:
            break
    return chosen, token_s


if __name__ == "__main__":
    sys.exit(answer_job(measure))
