"""The figure and the closing table of a search for the longest prompt and the largest batch. Nothing here measures."""

from __future__ import annotations

import math
import re

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workbench.measure.limit_trials import STOCK

PANELS = (
    # column, ratio to stock's, whether the search's cap was reached, axis label
    ("longest_tokens", "tokens_ratio", "tokens_capped", "longest prompt (tokens, batch 1)"),
    ("largest_batch", "batch_ratio", "batch_capped", "largest batch (prompts of {tokens} tokens)"),
    ("decode_tokens_per_s", "speed_ratio", None, "decoding at the largest batch (tokens/s)"),
)


def limits_figure(found: pd.DataFrame, batch_prompt_tokens: int) -> Figure:
    """Draw what each configuration survives at the same limit, and how fast it then decodes.

    Labels give the value and how many times stock's it is; "at least" where the search stopped at its cap.

    Parameters
    ----------
    found : DataFrame
        From `longest.search`.
    batch_prompt_tokens : int
        Length of each prompt of a batch.
    """
    figure = Figure(figsize=(13, 0.55 * len(found) + 1.7), layout="constrained")
    palette = sns.color_palette("colorblind")
    colors = ["0.55" if name == STOCK else palette[0] for name in found["configuration"]]
    for axis, (column, ratio, capped, label) in zip(
        figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0], PANELS, strict=True
    ):
        values = pd.to_numeric(found[column])
        axis.barh(found["configuration"], values.fillna(0), color=colors, height=0.62)
        for place, (value, times) in enumerate(zip(values, found[ratio], strict=True)):
            text = _label(value, times, capped is not None and bool(found[capped].iloc[place]))
            axis.annotate(text, (0 if math.isnan(value) else value, place), xytext=(4, 0), textcoords="offset points",
                          va="center", fontsize=9)  # fmt: skip
        axis.set_xlabel(label.format(tokens=batch_prompt_tokens))
        axis.set_xlim(0, 1.55 * max(values.max(), 1e-9) if values.notna().any() else 1)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=capped is not None))
        axis.grid(False, axis="y")
    figure.axes[0].invert_yaxis()
    limit_bytes = int(found["limit_bytes"].iloc[0])
    limit = f"{limit_bytes / 1e6:,.0f} MB for the whole process"
    figure.suptitle(f"At the same hard memory limit: {limit} (n = 1 process a trial)", fontsize=12)
    return figure


def _label(value: float, times: float, capped: bool) -> str:
    if math.isnan(value):
        return "none survived"
    least = "at least " if capped else ""
    ratio = "" if math.isnan(times) else f" ({times:.2g}x)" if times < 10 else f" ({times:.0f}x)"
    number = f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"
    return f"{least}{number}{ratio}"


def beside_paper(found: pd.DataFrame) -> pd.DataFrame:
    """Return the table "what / paper / here / why they differ".

    Parameters
    ----------
    found : DataFrame
        From `longest.search`.
    """
    emoe = found[found["configuration"] != STOCK]

    def ratios(column: str, ratio: str, capped: str | None) -> str:
        texts = []
        for _, row in emoe.iterrows():
            value = _label(float(pd.to_numeric(row[column])), float(row[ratio]), bool(capped and row[capped]))
            slow = ", some trials too slow at the limit" if row["slow_trials"] else ""
            texts.append(f"{row['configuration']}: {value}{slow}")
        return "; ".join(texts) or "not tried"

    rows = [
        (
            "Fig 17, longest prompt at equal memory",
            "16x (OpenMoE), 40x (Mixtral) of all experts resident",
            ratios("longest_tokens", "tokens_ratio", "tokens_capped"),
            "the ratio is (memory freed + what stock had left) / what stock had left: it depends on base_tokens, which "
            "sets how little stock has left; here the limit is of a process on the CPU, libraries included",
        ),
        (
            "Fig 18, largest batch at equal memory",
            "2x (OpenMoE), 4.5x (Mixtral)",
            ratios("largest_batch", "batch_ratio", "batch_capped"),
            "as above: the rule leaves stock room for one prompt of base_tokens, the paper left it more",
        ),
        (
            "Fig 18, throughput at the largest batch",
            "1.3 to 1.5x",
            ratios("decode_tokens_per_s", "speed_ratio", None),
            "exact means that missing experts are read for every step; the paper replaces them, as rerouting does. "
            "Few tokens after prompts of random ids, one trial each",
        ),
    ]
    return pd.DataFrame(rows, columns=["what", "paper", "here", "why they differ"])


def as_metrics(found: pd.DataFrame) -> dict[str, float | None]:
    """Return the limit and each configuration's results as metrics, named after the configuration."""
    metrics: dict[str, float | None] = {"limit_bytes": float(found["limit_bytes"].iloc[0])}
    kept = ("longest_tokens", "largest_batch", "tokens_ratio", "batch_ratio", "speed_ratio", "decode_tokens_per_s")
    for _, row in found.iterrows():
        name = re.sub(r"[^0-9a-z]+", "_", str(row["configuration"]).lower()).strip("_")
        for column in kept:
            value = float(pd.to_numeric(row[column]))
            metrics[f"{name}_{column}"] = None if math.isnan(value) else value
    return metrics
