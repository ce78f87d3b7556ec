"""What an observation reads, as HTML for a panel: memory, speed and quality, and every point tried."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pandas as pd

from emoe_core.planning.tasks import TASK_TYPES
from workbench.explore.explorer import Observation
from workbench.explore.html_view import BLUE, GREY, ORANGE, Part, bar, heading, served_bar
from workbench.machine.busy import busy_warning
from workbench.metrics.show import column_texts, show, show_bytes, words_of
from workbench.quality.configuration import ExperimentConfig

ALL_TASKS = "all tasks"
# Name, and how a reader tells better from worse.
SHOWN = (
    ("computed_bytes", "memory, computed"),
    ("measured_bytes", "memory, measured"),
    ("answer_tokens_per_s", "speed"),
    ("ttft_s", "first token"),
    ("perplexity_ratio", "perplexity ratio"),
    ("top1_agreement", "top-1 agreement"),
    ("hit_rate", "hit rate"),
)


def name_of(tasks: Sequence[str]) -> str:
    """Return what a choice of task types is called."""
    return ALL_TASKS if tuple(tasks) == TASK_TYPES else ", ".join(tasks)


def point_of(config: ExperimentConfig) -> dict[str, object]:
    """Return what the sliders set of a configuration, by name."""
    return {
        "budget": config.budget,
        "tolerance": config.tolerance,
        "interval": config.interval,
        "task": name_of(config.tasks),
    }


def points_frame(observations: Sequence[Observation]) -> pd.DataFrame:
    """Return one row per observation: what the sliders said, and its numbers."""
    return pd.DataFrame([point_of(seen.config) | seen.metrics for seen in observations])


def readout(seen: Observation) -> str:
    """Return an observation's memory as a bar against all experts resident, then its speed and quality."""
    metrics = seen.metrics
    whole = metrics["all_resident_bytes"]
    dense, slots = seen.stats.dense_bytes, metrics["slot_bytes"]
    rest = metrics["computed_bytes"] - dense - slots
    absent = max(0.0, 1 - metrics["computed_bytes"] / whole)
    parts = [
        Part("dense weights", dense / whole, show_bytes(dense), GREY),
        Part("slots", slots / whole, show_bytes(slots), BLUE),
        Part("cache and workspace", rest / whole, show_bytes(rest), ORANGE),
        Part("not resident", absent, f"{absent:.0%}", "#ddd"),
    ]
    memory = (
        f"{show_bytes(metrics['measured_bytes'])} measured, {show_bytes(metrics['computed_bytes'])} computed; "
        f"all resident {show_bytes(metrics['all_resident_bytes'])}"
    )
    rate, first = (show(name, metrics[name]) for name in ("answer_tokens_per_s", "ttft_s"))
    speed = f"{rate}, first token after {first}"
    doubt = busy_warning(metrics["others_cpu_share"])
    quality = (
        f"perplexity ratio {metrics['perplexity_ratio']:.3f}, top-1 agreement {metrics['top1_agreement']:.1%}, KL "
        f"{metrics['kl_nats']:.4f} nats, over {metrics['scored_tokens']:.0f} tokens of {metrics['prompts']:.0f} prompts"
    )
    counters = seen.stats.counters
    return "".join(
        [
            heading("Memory", memory),
            bar(parts, f"memory: {memory}"),
            heading("Speed", f"{speed} ({doubt})" if doubt else speed),
            heading("Quality", f"{quality}; 1.000 and 100% are the all-resident model itself"),
            heading("Experts", "requests of the scored prompts and the answer"),
            served_bar([counters.hits, counters.loads, counters.reroutes, counters.drops], "expert lookups"),
        ]
    )


def points_table(observations: Sequence[Observation]) -> str:
    """Return the observations as a table, the latest first and marked."""
    if not observations:
        return ""
    names = list(point_of(observations[0].config))
    heads = [f"<th style='text-align:right'>{escape(name)}</th>" for name in names]
    columns: list[list[str]] = [[str(point_of(seen.config)[name]) for seen in observations] for name in names]
    for name, label in SHOWN:
        unit, texts = column_texts(name, [seen.metrics[name] for seen in observations])
        told = f"{label} ({unit or words_of(name)})" if unit else label
        heads.append(f"<th style='text-align:right'>{escape(told)}</th>")
        columns.append(texts)
    rows = list(zip(*columns, strict=True))
    body = "".join(
        f"<tr{' style=font-weight:bold' if place == len(rows) - 1 else ''}>"
        + "".join(f"<td style='text-align:right;padding:0 8px'>{escape(text)}</td>" for text in rows[place])
        + "</tr>"
        for place in reversed(range(len(rows)))
    )
    return (
        f"{heading('Points tried', 'the latest first')}<div style='overflow-x:auto'>"
        f"<table style='color:inherit;font-variant-numeric:tabular-nums'><tr>{''.join(heads)}</tr>{body}</table></div>"
    )
