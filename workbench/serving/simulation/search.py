"""Where Algorithm 1 helps and where it hurts: seeded random settings of a service, each under FCFS and under it.

A setting is what notebook 12 can serve for real too: load, largest batch, and the tokens at which prompts and answers
are cut. Both schedulers get the same requests.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from emoe_core.errors import OptionError
from emoe_core.scheduler.costs import ServingCosts
from workbench.serving.simulation.cluster import Progress
from workbench.serving.simulation.comparison import variant
from workbench.serving.simulation.experiment import ServingConfig, cut_arrivals, simulate_serving

LOADS = (0.1, 1.0)
BATCHES = (2, 4, 8)  # costs are measured up to 8
INPUT_TOKENS = (16, 256)
OUTPUT_TOKENS = (4, 128)
SETTING = ("load", "max_batch", "max_input_tokens", "max_output_tokens")


def draw_settings(base: ServingConfig, count: int) -> list[ServingConfig]:
    """Return random settings from the configuration's seed: loads evenly, tokens evenly in their logarithm.

    KV memory holds a full batch. The first n of a larger draw are those of a smaller one.
    """
    if count < 1:
        raise OptionError(f"{count} settings cannot be searched: draw 1 or more")
    generator = np.random.default_rng([base.seed, 11])
    found = []
    for _ in range(count):
        load, *tokens = generator.uniform(size=3)
        batch = int(generator.choice(BATCHES))
        inputs, outputs = (
            round(low * (high / low) ** float(share))
            for share, (low, high) in zip(tokens, (INPUT_TOKENS, OUTPUT_TOKENS), strict=True)
        )
        found.append(
            replace(
                base,
                arrivals="poisson",
                load=round(LOADS[0] + load * (LOADS[1] - LOADS[0]), 2),
                max_batch=batch,
                max_input_tokens=inputs,
                max_output_tokens=outputs,
                kv_tokens=batch * (inputs + outputs),
            )
        )
    return found


def search_settings(
    base: ServingConfig, costs: ServingCosts, count: int, progress: Progress | None = None
) -> pd.DataFrame:
    """Simulate both schedulers at every setting.

    Parameters
    ----------
    base : ServingConfig
        What settings have in common, the number of requests and the seed among it.
    costs : ServingCosts
    count : int
        Settings to draw.
    progress : callable, optional
        Called with (stage, done, total).

    Returns
    -------
    DataFrame
        One row a setting, what helps mean latency most first: `SETTING`; ``latency_change, p99_change`` (of mean and
        P99 latency against FCFS), ``attainment_gain`` (of the share of requests that met both objectives), and what
        they are made of under either scheduler.
    """
    rows = []
    for place, setting in enumerate(draw_settings(base, count)):
        coming = cut_arrivals(setting, costs)
        found = {name: simulate_serving(variant(setting, name), costs, coming).metrics for name in ("fcfs", "emoe")}
        kept = ("latency_mean_s", "latency_p99_s", "attainment_share", "goodput_per_s")
        fcfs, emoe = found["fcfs"], found["emoe"]
        rows.append(
            {name: getattr(setting, name) for name in SETTING}
            | {
                "latency_change": emoe["latency_mean_s"] / fcfs["latency_mean_s"] - 1,
                "p99_change": emoe["latency_p99_s"] / fcfs["latency_p99_s"] - 1,
                "attainment_gain": emoe["attainment_share"] - fcfs["attainment_share"],
            }
            | {f"{scheduler}_{name}": metrics[name] for scheduler, metrics in found.items() for name in kept}
        )
        if progress is not None:
            progress("settings", place + 1, count)
    return pd.DataFrame(rows).sort_values("latency_change", ignore_index=True)
