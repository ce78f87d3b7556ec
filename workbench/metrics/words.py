"""Where a metric was measured, and what groups of metrics are about.

A run of the bench measures up to three times, and names tell which: without a prefix it is the *quality measurement*,
in the notebook's own process; ``fresh_`` is the same configuration alone in a new process, ``stock_`` transformers with
every expert resident in another. The last two have a data type of their own, so that their bytes are not those of the
first. What holds the two against each other (`COMPARED`) is of neither.
"""

from __future__ import annotations

from collections.abc import Collection

from workbench.metrics.catalogue import FRESH, MEMORY, OTHER, QUALITY, STOCK, TIME, metric_of

OWN, BOTH = "own", "both"
PLACES = (OWN, FRESH, STOCK, BOTH)

# A metric that compares the two fresh processes, and the one whose two values it compares.
COMPARED = {
    "memory_ratio": "serving_bytes",
    "tpot_ratio": "tpot_s",
    "ttft_ratio": "ttft_s",
    "others_cpu_share": "others_cpu_share",
}
GROUP_MEANINGS = {
    MEMORY: "Slots, experts and dense weights are computed, peaks are the operating system's.",
    QUALITY: "Against the same model with every expert resident.",
    TIME: "Of a clock, on the machine named below.",
    OTHER: "How expert requests were served, and counts. A request is one expert that a layer wants in one pass.",
}


def place_of(metric: str, metrics: Collection[str]) -> tuple[str, str]:
    """Return where a metric was measured (one of `PLACES`) and the name of what was measured there.

    Parameters
    ----------
    metric : str
    metrics : collection of str
        All metrics of its run: what compares two fresh processes needs them.
    """
    for place in (FRESH, STOCK):
        measured = metric.removeprefix(f"{place}_")
        if measured != metric and metric_of(measured) is not None and not measured.endswith("_ratio"):
            return place, measured
    compared = COMPARED.get(metric)
    if compared is not None and {f"{FRESH}_{compared}", f"{STOCK}_{compared}"} <= set(metrics):
        return BOTH, compared
    return OWN, metric
