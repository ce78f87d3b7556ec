"""Tables and figure of a validated simulation. Nothing here serves or simulates."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from workbench.paper.figures import say_n
from workbench.serving.checks.agreement import AIM
from workbench.tracking.findings import Findings


def agreement_figure(requests: pd.DataFrame) -> Figure:
    """Draw every request's end-to-end latency, simulated over real, one panel a scheduler.

    Parameters
    ----------
    requests : DataFrame
        Of `validation.Validation`.
    """
    names = list(requests["scheduler"].unique())
    figure = Figure(layout="constrained", dpi=96, figsize=(4.6 * len(names), 4.4))
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(panels, names, strict=True):
        pairs = requests[requests["scheduler"] == name].pivot(index="number", columns="driver", values="latency_s")
        longest = float(pairs.to_numpy().max()) * 1.05
        axis.plot([0, longest], [0, longest], color="0.4", linewidth=1.2, label="equal")
        axis.fill_between(
            [0, longest], [0, longest * (1 - AIM)], [0, longest * (1 + AIM)], color="0.88", label=f"within {AIM:.0%}"
        )
        axis.scatter(
            pairs["real"], pairs["simulated"], color=sns.color_palette("colorblind")[0], s=22, label="a request"
        )
        axis.set(xlabel="real latency (s)", ylabel="simulated latency (s)", xlim=(0, longest), ylim=(0, longest))
        axis.set_title(name, loc="left")
        say_n(axis, len(pairs), "requests")
    panels[0].legend(frameon=False)
    return figure


def beside_paper(validated: pd.DataFrame, scaled: pd.DataFrame) -> pd.DataFrame:
    """Return the table "paper, here, why they differ".

    Parameters
    ----------
    validated : DataFrame
        `validation.Validation.table`.
    scaled : DataFrame
        Of `scale.scale_up`.
    """
    known = validated.set_index(["scheduler", "metric"])
    rows = [
        (
            f"simulated over real, {scheduler} (refitted to its own passes)",
            "not in the paper (measured on one GPU)",
            ", ".join(
                f"{label} {known.loc[(scheduler, metric), 'ratio'] - 1:+.0%} "
                f"({known.loc[(scheduler, metric), 'refitted_ratio'] - 1:+.0%})"
                for label, metric in (
                    ("mean latency", "latency_mean_s"),
                    ("P99", "latency_p99_s"),
                    ("mean TTFT", "ttft_mean_s"),
                )
            ),
            f"aim: within {AIM:.0%}; a machine's speed changes from one minute to the next, a prompt's time is a line "
            "through few lengths, and near saturation small errors add up in the queue",
        )
        for scheduler in validated["scheduler"].unique()
    ]
    largest = scaled.sort_values("replicas").iloc[-1]
    rows.append(
        (
            f"{largest['replicas']:,.0f} replicas",
            "one engine",
            f"{largest['rate_per_s']:,.0f} arrivals a second, {largest['simulated_per_wall_s']:,.0f} requests "
            "simulated a second",
            "a simulation on one core; no network, no failures, all replicas alike",
        )
    )
    return pd.DataFrame(rows, columns=["what", "paper", "here", "why they differ"])


def validation_metrics(found: Findings) -> dict[str, float]:
    """Return what was compared, real, simulated and as ratios, and how much was simulated in a second."""
    metrics: dict[str, float] = {}
    for row in found["validation"].to_dict("records"):
        kinds = ("real", "simulated", "ratio", "refitted_ratio")
        metrics |= {f"{row['scheduler']}_{row['metric']}_{kind}": row[kind] for kind in kinds}
    return metrics | {
        "others_cpu_share": found["machine"]["others_cpu_share"].iloc[0],
        "scale_arrivals_per_s": found["scale"]["rate_per_s"].max(),
        "scale_simulated_per_s": found["scale"]["simulated_per_wall_s"].iloc[-1],
    }
