"""Ways to save expert memory on the same prompts: caches, fewer bits, and what each takes in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from workbench.quality.configuration import ExperimentConfig
from workbench.quality.noise_floor import noise_floor
from workbench.quality.variants import Progress, run_quantized, run_variants, timed
from workbench.tracking.findings import Findings


@dataclass(frozen=True)
class Timing:
    """How variants are timed in fresh processes, each ``rounds`` times; 0 rounds are none.

    Of each process ``prompts`` are timed, ``tokens`` tokens each, after one prompt to warm up.
    """

    rounds: int
    budget: str
    prompts: int
    tokens: int
    dtype: str


def measure_memory_and_accuracy(
    base: ExperimentConfig,
    variants: Mapping[str, ExperimentConfig],
    formats: Sequence[str],
    timing: Timing,
    progress: Progress,
) -> Findings:
    """Run variants, a control with everything resident, quantised experts, and, if wanted, time what most systems do.

    Parameters
    ----------
    base : ExperimentConfig
        The control's, the quantised experts' and the timed processes'; where it asks for answers, the noise floor of
        their similarity is measured too.
    variants : mapping of str to ExperimentConfig
    formats : sequence of str
        Of `quantized.FORMATS`.
    timing : Timing
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Findings
        The tables of a `Comparison`; ``times`` (`variants.timed`) and ``noise_floor`` where they were measured.
    """
    found = run_variants({**variants, "all resident": replace(base, budget="100%", answers=0)}, progress)
    if formats:
        found += run_quantized(base, formats, progress)
    return found.findings(
        noise_floor=noise_floor(base, progress) if base.answers else None, times=_times(base, timing, progress)
    )


def _times(base: ExperimentConfig, timing: Timing, progress: Progress) -> pd.DataFrame | None:
    if not timing.rounds:
        return None
    common: dict[str, Any] = {"dtype": timing.dtype, "device": base.device}
    exact = {**common, "budget": timing.budget, "tolerance": 0.0, "predictor": None}
    lossy = {**common, "budget": timing.budget, "tolerance": 1.0, "predictor": "frequency", "interval": base.interval}
    return timed(
        {
            "stock transformers": {**common, "implementation": "stock"},
            "emoe, all resident": {**common, "budget": "100%", "predictor": None},
            "on demand": exact,
            "eMoE": lossy,
        },
        base,
        prompts=timing.prompts,
        tokens=timing.tokens,
        rounds=timing.rounds,
        progress=progress,
    )
