"""Figures and closing table of a comparison of ways to save expert memory.

The eMoE paper's Figs. 1, 2, 14 to 16 and Table 3. Nothing here measures.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from emoe_core.experts.rerouting import DROP, REROUTE
from workbench.machine.busy import busy_warning
from workbench.measure.memory import MemoryMeasurement
from workbench.paper.figures import say_n
from workbench.quality.quantized import FORMATS
from workbench.quality.variants import paired_difference

# What knows every prompt to come, and what knows nothing: drawn in grey, dashed.
BOUNDS = ("oracle", "random")
MARKERS = "osD^vPX*<>"
# Points of one budget stand beside each other, so that one that is as good as another does not hide it.
DODGE = 0.025
# Beyond, a control that loses much would press the others' lines together.
WIDE_RATIO = 3.0
# A KL below this is rounding, one of 0 has no place on a logarithmic axis.
FLOOR_NATS = 1e-6


def expert_memory_share(summary: pd.DataFrame) -> pd.Series:
    """Return expert memory over that of all experts in 16 bits: slots for a cache, the format for quantised experts.

    Slots of 8 bits count half; their rows' scales (0.1 to 0.4% of it) are left out.
    """
    slots, formats = (
        summary.get(name, pd.Series(np.nan, summary.index)) for name in ("slot_share", "expert_memory_share")
    )
    kinds = summary.get("expert_dtype", pd.Series("auto", summary.index))
    return formats.fillna(slots * np.where(kinds == "int8", 0.5, 1.0))


def arms_of(summary: pd.DataFrame) -> pd.Series:
    """Return each row's arm: who chose its residents, or "drop" where absent experts were dropped (`variants.arm`)."""
    dropped = summary.get("on_miss", pd.Series(REROUTE, summary.index)) == DROP
    return summary["strategy"].mask(dropped, DROP)


def accuracy_figure(summary: pd.DataFrame) -> Figure:
    """Draw KL and perplexity ratio over the share of expert memory, one line a strategy; quantised formats are points.

    Parameters
    ----------
    summary : DataFrame
        Of a `Comparison`: ``strategy``, ``kl_nats``, ``perplexity_ratio`` with its interval, ``slot_share`` or
        ``expert_memory_share``.
    """
    table = _without_control(summary)
    table = table.assign(strategy=arms_of(table))
    figure = Figure(layout="constrained", dpi=96, figsize=(11.5, 4.6))
    axes = figure.subplots(1, 2)
    order = sorted(table["strategy"].unique(), key=lambda name: (name in BOUNDS, name))
    for number, strategy in enumerate(order):
        group = table[table["strategy"] == strategy].sort_values("share")
        bound = strategy in BOUNDS
        look = {
            "color": str(0.25 + 0.3 * BOUNDS.index(strategy))
            if bound
            else sns.color_palette("colorblind")[number % 10],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": "--" if bound else "-",
            "fillstyle": "none" if bound else "full",
            "markersize": 7,
        }
        place = group["share"] + DODGE * (number - (len(order) - 1) / 2)
        lossy = group["kl_nats"] > 0  # nothing lost has no place on a logarithmic axis
        shown_kl = group["kl_nats"][lossy].clip(lower=FLOOR_NATS)
        if lossy.any():
            axes[0].plot(place[lossy], shown_kl, label=arm_name(strategy), **look)
        ratio = group["perplexity_ratio"]
        spread = [ratio - group["perplexity_ratio_low"], group["perplexity_ratio_high"] - ratio]
        axes[1].errorbar(place, ratio, yerr=np.maximum(spread, 0), capsize=3, label=arm_name(strategy), **look)
    say_n(axes[1], summary["prompts"].max())
    axes[0].set_yscale("log")
    if table["perplexity_ratio"].max() > WIDE_RATIO:
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("KL to all-resident (nats per token)")
    axes[1].axhline(1.0, color="0.4", linestyle=":", linewidth=1.2)
    axes[1].set_ylabel("perplexity ratio to all-resident\n(95% interval over prompts)")
    for axis in axes:
        axis.set_xlabel("expert memory (share of all experts in 16 bits;\npoints of one share stand side by side)")
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xlim(0, 1.02)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _floor(floor: pd.DataFrame | None) -> str:
    if floor is None:
        return "No answers were compared in this run"
    ways = ", ".join(f"{row.similarity:.1%} with {row.label}" for row in floor.itertuples())
    return f"Rounding alone leaves all-resident answers alike to {ways}"


def _without_control(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that save memory, with their ``share`` of it: where everything is resident nobody chooses."""
    table = summary.assign(share=expert_memory_share(summary))
    return table[table["share"] < 1]


def time_figure(times: pd.DataFrame) -> Figure:
    """Draw time per output token and memory of each variant, as ratios to the first.

    Parameters
    ----------
    times : DataFrame
        From `comparison.timed`.
    """
    figure = Figure(layout="constrained", dpi=96, figsize=(11, 0.45 * len(times) + 1.5))
    axes = figure.subplots(1, 2, sharey=True)
    place = np.arange(len(times))
    color = sns.color_palette("colorblind")
    spread = [times["tpot_ratio"] - times["tpot_ratio_low"], times["tpot_ratio_high"] - times["tpot_ratio"]]
    axes[0].barh(place, times["tpot_ratio"], xerr=np.maximum(spread, 0), color=color[0], capsize=3)
    axes[1].barh(place, times["serving_ratio"], color=color[2])
    axes[0].set_yticks(place, times["label"])
    axes[0].invert_yaxis()
    axes[0].set_xlabel(f"time per output token, ratio to {times['label'].iloc[0]} (range over rounds)")
    axes[1].set_xlabel("measured memory while serving, ratio")
    warning = busy_warning(float(times["others_cpu_share"].max()))
    if warning:
        axes[0].set_title(warning, fontsize=9, color="#b00020", loc="left")
    say_n(axes[1], times["rounds"].max(), "rounds")
    for axis in axes:
        axis.axvline(1.0, color="0.4", linestyle=":", linewidth=1.2)
    return figure


def memory_table(measured: Mapping[str, MemoryMeasurement]) -> pd.DataFrame:
    """Return memory and times of fresh processes, a row each, by name; `figures.memory_terms` draws it."""
    kept = ("dense_bytes", "slot_bytes", "load_s", "ttft_s", "tpot_s", "stall_share", "page_cache")
    rows = [
        {"name": name, "measured_bytes": one.model_bytes} | {column: getattr(one, column) for column in kept}
        for name, one in measured.items()
    ]
    return pd.DataFrame(rows)


def broken_bounds(summary: pd.DataFrame, requests: pd.DataFrame) -> list[str]:
    """Return what contradicts the bounds: strategies clearly better than the oracle, or clearly worse than random.

    Clearly: the 95% interval of the paired difference in KL, at the same budget, excludes 0; with too few prompts for
    an interval nothing is clear. Only lossy strategies count: an exact one loses nothing. What is resident in one layer
    changes what the next ones see, so hindsight of each layer's use need not be the best set for the output.

    Parameters
    ----------
    summary, requests : DataFrame
        Of a `Comparison`.
    """
    lossy = summary[(summary["tolerance"] > 0) & summary["strategy"].map(_is_cache) & (arms_of(summary) != DROP)]
    found = []
    for (budget, _, _), group in lossy.groupby(["budget", "mix", "seed"]):
        labels = dict(zip(group["strategy"], group["label"], strict=True))
        for strategy, label in labels.items():
            for bound, sign in (("oracle", 1), ("random", -1)):
                if strategy in BOUNDS or bound not in labels:
                    continue
                _, low, high = paired_difference(requests, labels[bound], label, "kl_nats")
                if min(sign * low, sign * high) > 0:
                    found.append(f"{strategy} is {'better' if sign > 0 else 'worse'} than {bound} at {budget}")
    return found


def _is_cache(strategy: str) -> bool:
    return strategy not in FORMATS


def beside_paper(
    summary: pd.DataFrame, times: pd.DataFrame | None = None, floor: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return the table "paper, here, why they differ" with this run's figures; ``floor`` is `noise_floor`'s."""
    table = _without_control(summary)
    table = table.assign(strategy=arms_of(table))

    def told(strategy: str) -> str:
        rows = table[(table["strategy"] == strategy) & ((table["tolerance"] > 0) | ~table["strategy"].map(_is_cache))]
        parts = []
        for row in rows.sort_values("share").itertuples():
            similar = getattr(row, "similarity", float("nan"))
            extra = "" if similar != similar else f", similarity {similar:.1%} ({row.similarity_prompts:.0f} answers)"
            parts.append(f"{row.share:.0%}: perplexity x{row.perplexity_ratio:.3f}{extra}")
        return "; ".join(parts) or "not in this run"

    rows = [
        (
            "Fig. 14, eMoE",
            "20 to 80% of memory saved at 93.7 to 99.8% similarity; 60% loaded: 98.2 to 98.8%",
            told("frequency"),
            f"primary here: the next token's distribution. {_floor(floor)}",
        ),
        (
            "Fig. 14, random subset",
            "4 to 8.6 points lower",
            told("random"),
            "drawn anew at every prediction",
        ),
        (
            "the absent expert dropped",
            "not given; others call it catastrophic",
            told(DROP),
            "the residents of eMoE; weights of the experts that are left keep each token's total",
        ),
        (
            "Figs. 15, 16, activation map (MoE-Infinity's)",
            "98.1 to 98.7%",
            told("activation_map"),
            "its predictor in our engine: absent experts are replaced, not loaded",
        ),
        ("oracle", "not given", told("oracle"), "each prompt's own most used experts: no system can know them"),
        (
            "Table 3, 8-bit experts",
            "95.2%",
            told("q8_0"),
            "round to nearest with a scale for 32 weights; the paper does not say what it quantised, or how",
        ),
        ("Table 3, 4-bit experts", "91.5%", told("q4_0"), "as above; memory saved is not the cache's to choose"),
    ]
    if times is not None and len(times):
        by_label = times.set_index("label")

        def ratio(label: str, base: str) -> str:
            if label not in by_label.index or base not in by_label.index:
                return "not in this run"
            return f"x{by_label.loc[label, 'tpot_s'] / by_label.loc[base, 'tpot_s']:.2f} a token"

        rows += [
            (
                "Fig. 1, on demand against all resident",
                "3.2x and 5x slower; memory 1.4 to 1.5x lower",
                ratio("on demand", "emoe, all resident"),
                "how long a miss takes against how long an expert computes: storage, expert size and processor",
            ),
        ]
    return pd.DataFrame(rows, columns=["what", "paper", "here", "why they differ"])


def arm_name(strategy: str) -> str:
    """Return an arm as legends call it."""
    names = {
        "frequency": "eMoE: decayed frequency",
        "lru": "on demand, LRU (exact)",
        "drop": "eMoE's residents, absent dropped",
        "random": "random subset",
        "oracle": "oracle (hindsight)",
        "activation_map": "activation map",
        "q8_0": "8-bit experts",
        "q4_0": "4-bit experts",
    }
    return names.get(strategy, strategy)
