"""Figures and closing tables of simulated services (Fig. 12 of the eMoE paper, and replicas behind a router).

Nothing here simulates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from emoe_core.scheduler.costs import ServingCosts
from workbench.machine.busy import busy_warning
from workbench.paper.figures import say_n
from workbench.serving.checks.throughput import ON_DEMAND
from workbench.serving.costs import conditions
from workbench.tracking.findings import Findings

MARKERS = "os^DvPX*"
COLUMNS = ["what", "paper", "here", "why they differ"]
# What people read first of a service.
FIRST = (
    *("label", "router", "load", "rate_per_s", "ttft_mean_s", "ttft_p90_s", "tpot_mean_s", "latency_mean_s"),
    *("latency_p50_s", "latency_p90_s", "latency_p99_s", "attainment_share", "goodput_per_s", "held_mass"),
)
SERVED = ("latency_mean_s", "ttft_mean_s", "attainment_share", "goodput_per_s")
LINES = ("-", "--", "-.", ":")
# Of the rates drawn: lines that coincide run side by side.
DODGE = 0.02


def service_figure(table: pd.DataFrame, by: str = "label", reference_load: float | None = None) -> Figure:
    """Draw latency, attainment and goodput over the request rate, one line a scheduler or router.

    Parameters
    ----------
    table : DataFrame
        Of `comparison.compare_schedulers` (``by="label"``) or `compare_routers` (``by="router"``).
    reference_load : float, optional
        Marked by a vertical line.
    """
    figure = Figure(layout="constrained", dpi=96, figsize=(13, 4.2))
    axes = figure.subplots(1, 3)
    drawn = (
        ("latency_mean_s", "mean end-to-end latency (s)"),
        ("attainment_share", "requests that met both objectives"),
        ("goodput_per_s", "goodput (requests/s that met them)"),
    )
    names = list(table[by].unique())
    step = DODGE * float(table["load"].max() - table["load"].min())
    for number, name in enumerate(names):
        rows = table[table[by] == name].sort_values("load")
        look: dict[str, Any] = {
            "color": sns.color_palette("colorblind")[number % 10],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }
        place = rows["load"] + step * (number - (len(names) - 1) / 2)
        for axis, (column, _) in zip(axes, drawn, strict=True):
            axis.plot(place, rows[column], label=name, linewidth=1.6, markersize=6, **look)
    say_n(axes[2], table["requests"].max(), "requests a point")
    for axis, (_, text) in zip(axes, drawn, strict=True):
        axis.set_ylabel(text)
        axis.set_xlabel("request rate (share of full-batch capacity;\npoints of one rate stand side by side)")
        axis.set_ylim(bottom=0)
        if reference_load is not None:
            axis.axvline(reference_load, color="0.4", linestyle=":", linewidth=1.2)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[1].set_ylim(0, 1.04)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def search_figure(searched: pd.DataFrame) -> Figure:
    """Draw what Algorithm 1 changes at random settings against FCFS: mean latency and kept objectives over the load.

    Parameters
    ----------
    searched : DataFrame
        Of `simulation.search.search_settings`.
    """
    figure = Figure(layout="constrained", dpi=96, figsize=(11, 4.2))
    axes = figure.subplots(1, 2)
    drawn = (
        ("latency_change", "mean latency against FCFS\n(below 0: Algorithm 1 is faster)"),
        ("attainment_gain", "requests that met both objectives,\nagainst FCFS (above 0: more)"),
    )
    sizes = sorted(searched["max_batch"].unique())
    for axis, (column, text) in zip(axes, drawn, strict=True):
        for number, batch in enumerate(sizes):
            rows = searched[searched["max_batch"] == batch]
            look = {"color": sns.color_palette("colorblind")[number], "marker": MARKERS[number % len(MARKERS)]}
            axis.scatter(rows["load"], rows[column], s=28, label=f"batch of {batch}", **look)
        axis.axhline(0.0, color="0.4", linestyle=":", linewidth=1.2)
        axis.set_ylabel(text)
        axis.set_xlabel("request rate (share of full-batch capacity)")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set_yscale("symlog", linthresh=0.1)
    say_n(axes[1], len(searched), "settings")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def search_beside_paper(searched: pd.DataFrame) -> pd.DataFrame:
    """Return the row "paper, here, why they differ" of a search for where Algorithm 1 helps and where it hurts."""

    def told(row: pd.Series) -> str:
        return (
            f"{row['latency_change']:+.1%} (load {row['load']:.2f}, batch of {row['max_batch']:.0f}, prompts up to "
            f"{row['max_input_tokens']:.0f}, answers up to {row['max_output_tokens']:.0f} tokens; objectives met "
            f"{row['attainment_gain']:+.0%})"
        )

    helped = (searched["latency_change"] < 0).mean()
    row = (
        f"Fig. 12, mean latency against FCFS at {len(searched)} random settings",
        "9 to 17% below DeepSpeed-FastGen",
        f"lower at {helped:.0%} of them; best {told(searched.iloc[0])}; worst {told(searched.iloc[-1])}",
        "simulated: the paper gives one setting a model; chosen after the fact, both ends flatter their side",
    )
    return pd.DataFrame([row], columns=COLUMNS)


def caveat(costs: ServingCosts, slots: int | None = None) -> str:
    """Return what to know of the costs behind a simulation: where they come from, and whether to trust them.

    ``slots`` are the experts a layer that are simulated, where these are not the measured ones.
    """
    told = costs.settings
    where = f"{costs.environment.get('cpu', 'unknown processor')}, {costs.environment.get('threads', '?')} threads"
    text = f"costs: budget {told.get('budget')}, {told.get('dtype')}, tolerance {told.get('tolerance')}, {where}"
    used = conditions.conditions_here()
    if slots is not None:
        used = replace(used, slots_per_layer=(slots,) * len(costs.slots_per_layer))
    doubts = [busy_warning(costs.environment.get("others_cpu_share")), conditions.warning(costs, used)]
    return "; ".join([text, *filter(None, doubts)])


def schedulers_beside_paper(
    gained: pd.DataFrame,
    reachable: pd.DataFrame,
    reference: pd.Series,
    throughput: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return the table "paper, here, why they differ" for Fig. 12.

    Parameters
    ----------
    gained : DataFrame
        Of `comparison.gains`, against FCFS.
    reachable : DataFrame
        Of `comparison.reachable_loads`.
    reference : Series
        The reference ``load``, and there the `comparison.bounds` of FCFS.
    throughput : DataFrame, optional
        Of `throughput.summary`: what was served for real.
    """
    known = gained[gained["load"] == reference["load"]].set_index("label")
    if "eMoE" not in known.index:
        return pd.DataFrame(columns=COLUMNS)
    emoe = known.loc["eMoE"]
    rows = [
        (
            f"Fig. 12, mean latency at load {reference['load']:.2f} (FCFS meets 90%)",
            "9 to 17% below DeepSpeed-FastGen",
            f"{emoe['latency_change']:+.1%} against FCFS (no scheduler: below {reference['latency_change']:+.1%})",
            "the same engine under both, so only the order counts; and keeping objectives means holding requests back, "
            "which costs mean latency",
        ),
        (
            "goodput at the same rate",
            "not in the paper",
            f"{emoe['goodput_ratio']:.2f}x of FCFS (no scheduler: above {reference['goodput_ratio']:.2f}x); objectives "
            f"met {emoe['attainment_share']:.0%}",
            "a prompt that runs holds up all who decode; the estimate sees that, an order of arrival does not",
        ),
        (
            "rate up to which 90% of objectives are met",
            "not in the paper",
            "; ".join(f"{row.label} {row.load:.2f} ({row.ratio:.2f}x)" for row in reachable.itertuples()),
            "goodput as DistServe defines it: the rate at which promises can be kept; in the row above FCFS's own "
            "90% is a cap",
        ),
    ]
    for label, what in (("eMoE, oracle lengths", "true output lengths"), ("eMoE, dE = 0", "without loading latency")):
        if label in known.index:
            row = known.loc[label]
            rows.append(
                (
                    f"eMoE, {what}",
                    "not in the paper",
                    f"latency {row['latency_change']:+.1%}, goodput {row['goodput_ratio']:.2f}x of FCFS",
                    "what the estimate's part is worth here",
                )
            )
    rows.append(
        (
            "share of routed choices covered by residents",
            "the same experts under all schedulers",
            f"FCFS {known.loc['FCFS', 'held_mass']:.1%}, eMoE {emoe['held_mass']:.1%}",
            "quality is compared by this alone: a simulation computes no token",
        )
    )
    if throughput is not None and "ratio" in throughput:
        spread = [
            f"{row.system} {row.ratio:.2f}x ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
            for row in throughput.itertuples()
            if row.system != ON_DEMAND
        ]
        rows.append(
            (
                "throughput over LRU on demand at equal memory, measured",
                "1.3 to 1.5x (Fig. 18, by a larger batch)",
                "; ".join(spread),
                "a full batch asks for nearly every expert in every step, so on demand reads in every step; what "
                "replacing costs in quality is notebook 08's",
            )
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def routers_beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table "paper, here, why they differ" for routing between replicas, at each load."""
    rows = []
    for load, group in table.groupby("load"):
        known = group.set_index("router")
        base = known.loc["round_robin"]
        for router in known.index.drop("round_robin"):
            row = known.loc[router]
            loads = row["expert_loads"] / max(base["expert_loads"], 1)
            rows.append(
                (
                    f"{router} at load {load:.2f}, against round robin",
                    "not in the paper (one engine)",
                    f"mean latency {row['latency_mean_s'] / base['latency_mean_s'] - 1:+.1%}, experts loaded "
                    f"x{loads:.2f}, covered {row['held_mass']:.1%} (round robin {base['held_mass']:.1%})",
                    "fewer tasks at a replica: fewer swaps, a better fit; but one task's burst meets fewer replicas",
                )
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def beside_paper(found: Findings) -> pd.DataFrame:
    """Return the table "paper, here, why they differ" of a comparison of services (`serving.comparison`)."""
    parts = [
        schedulers_beside_paper(found["gains"], found["reachable"], found["reference"].iloc[0], found.get("throughput"))
    ]
    if (routed := found.get("routed")) is not None:
        parts.append(routers_beside_paper(routed))
    if (searched := found.get("searched")) is not None:
        parts.append(search_beside_paper(searched))
    return pd.concat(parts, ignore_index=True)


def scheduling_metrics(found: Findings) -> dict[str, float]:
    """Return each scheduler's figures at the reference load and reachable load, each router's, and each throughput."""
    reference = found["reference"].iloc[0]
    metrics = {"reference_load": reference["load"]}
    metrics |= {f"bound_{name}": reference[name] for name in ("latency_change", "goodput_ratio")}
    metrics |= {f"{row['variant']}_reachable_load": row["load"] for row in found["reachable"].to_dict("records")}
    services = found["services"]
    for row in services[services["load"] == reference["load"]].to_dict("records"):
        metrics |= {f"{row['variant']}_{name}": row[name] for name in SERVED}
    for row in [] if (routed := found.get("routed")) is None else routed.to_dict("records"):
        kept = ("latency_mean_s", "attainment_share", "goodput_per_s", "expert_loads", "held_mass")
        metrics |= {f"{row['router']}_{row['load']:g}_{name}": row[name] for name in kept}
    if (searched := found.get("searched")) is not None:
        changes = searched["latency_change"]
        metrics |= {"searched_best_latency_change": changes.min(), "searched_worst_latency_change": changes.max()}
        metrics["searched_helped_share"] = float((changes < 0).mean())
    for row in [] if (throughput := found.get("throughput")) is None else throughput.to_dict("records"):
        metrics[f"{row['system'].replace(' ', '_')}_tokens_per_s"] = row["tokens_per_s"]
    return metrics
