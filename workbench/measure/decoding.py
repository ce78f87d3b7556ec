"""How fast a system decodes given tokens, in a fresh process, its files out of the page cache (`decode_job.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.machine.control_groups import Controller
from workbench.measure.launch import Launched, launch

# Loading and warming up come on top of what decoding may take.
EXTRA_SECONDS = 1800.0


def measure_decoding(
    spec: dict[str, Any],
    files: Sequence[Path] = (),
    *,
    limit_bytes: int | None = None,
    controller: Controller | None = None,
) -> Launched:
    """Run a system and wait for it; a system that its limit ends, or that is too slow, is a result.

    Parameters
    ----------
    spec : dict
        ``adapter`` and its ``options``, ``checkpoint``, ``dtype``, ``threads``, the four token sequences of
        `workbench.bench.forced_tokens`, ``max_tokens`` (the longest) and ``max_seconds`` (of decoding).
    files : sequence of Path
        Dropped from the page cache first.
    limit_bytes, controller
        As `launch`.
    """
    return launch(
        "workbench.measure.decode_job",
        spec,
        uncached=files,
        limit_bytes=limit_bytes,
        controller=controller,
        timeout_s=1.25 * spec["max_seconds"] + EXTRA_SECONDS,
        threads=spec["threads"],
    )
