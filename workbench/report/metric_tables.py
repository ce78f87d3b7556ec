"""The metrics of a run as tables, one a group: a line for what was measured, a column for where it was measured.

A run of the bench measures up to three times, and names tell which: without a prefix it is the *quality measurement*,
in the notebook's own process; ``fresh_`` is the same configuration alone in a new process, ``stock_`` transformers with
every expert resident in another. The last two have a data type of their own, so that their bytes are not those of the
first. What holds the two against each other (`COMPARED`) is of neither.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from workbench.metrics.catalogue import FRESH, GROUP_MEANINGS, STOCK, metric_of
from workbench.metrics.show import show, title_of

OWN, BOTH = "own", "both"
PLACES = (OWN, FRESH, STOCK, BOTH)

# A metric that compares the two fresh processes, and the one whose two values it compares.
COMPARED = {
    "memory_ratio": "serving_bytes",
    "tpot_ratio": "tpot_s",
    "ttft_ratio": "ttft_s",
    "others_cpu_share": "others_cpu_share",
}
QUALITY = "perplexity_ratio"  # what every quality measurement tells
CHECKPOINT_DTYPE = "the checkpoint's dtype"
HEADINGS = {OWN: "quality measurement", FRESH: "fresh process", STOCK: "stock", BOTH: "compared"}
PLACE_MEANINGS = {
    OWN: "Prompts scored under the budget, in the notebook's own process.",
    FRESH: "The same configuration alone in a new process, for memory and time.",
    STOCK: "Transformers with every expert resident, alone in a new process.",
    BOTH: "The fresh process per stock; of the processor time that others took, the larger.",
}


@dataclass(frozen=True)
class MetricRow:
    """What was measured: its words and meaning, and for each column the text and the metric's name, or both empty."""

    words: str
    meaning: str
    cells: list[tuple[str, str]]


@dataclass(frozen=True)
class MetricTable:
    """The metrics of one group; `headings` are those of its columns."""

    group: str
    meaning: str
    headings: list[str]
    rows: list[MetricRow]


def metric_tables(
    metrics: Mapping[str, float], params: Mapping[str, Any], environment: Mapping[str, Any]
) -> tuple[list[MetricTable], list[tuple[str, str]]]:
    """Return a run's metrics by group, and what the headings mean as (heading, sentence).

    Parameters
    ----------
    metrics, params : mapping
        Of the run; ``dtype`` and ``timing_dtype`` are the data types of its measurements.
    environment : mapping
        Of the run; its ``dtype`` is what ``auto`` came to in the quality measurement.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in sorted(metrics, key=lambda name: (metric_of(name).rank, place_of(name, metrics)[1])):
        place, measured = place_of(name, metrics)
        found.setdefault(metric_of(name).group, {}).setdefault(measured, {})[place] = name
    headings = _headings(metrics, params, environment)
    tables = []
    for group, rows in found.items():
        places = [place for place in PLACES if any(place in row for row in rows.values())]
        lines = [
            MetricRow(
                title_of(measured),
                metric_of(measured).meaning,
                [(show(row[place], metrics[row[place]]), row[place]) if place in row else ("", "") for place in places],
            )
            for measured, row in rows.items()
        ]
        tables.append(MetricTable(group, GROUP_MEANINGS[group], [headings[place] for place in places], lines))
    used = {place_of(name, metrics)[0] for name in metrics} - (set() if QUALITY in metrics else {OWN})
    return tables, [(headings[place], PLACE_MEANINGS[place]) for place in PLACES if place in used]


def _headings(
    metrics: Mapping[str, float], params: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, str]:
    own, timed = params.get("dtype"), params.get("timing_dtype")
    own = environment.get("dtype") or CHECKPOINT_DTYPE if own == "auto" else own
    timed = CHECKPOINT_DTYPE if timed == "auto" else timed
    dtypes = {OWN: own, FRESH: timed, STOCK: timed}
    found = {place: f"{words} ({dtypes[place]})" if dtypes.get(place) else words for place, words in HEADINGS.items()}
    return found if QUALITY in metrics else found | {OWN: "value"}


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
        if measured != metric and metric_of(measured).meaning and not measured.endswith("_ratio"):
            return place, measured
    compared = COMPARED.get(metric)
    if compared is not None and {f"{FRESH}_{compared}", f"{STOCK}_{compared}"} <= set(metrics):
        return BOTH, compared
    return OWN, metric
