"""The figure of a bench: tokens a second of each system with its spread, and the bound of its own reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def bench_figure(table: pd.DataFrame, notes: dict[str, Any], title: str) -> Figure:
    """Draw a table of `summary.summarise`; systems that were not measured stand with their outcome."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.42 * len(table) + 1.6), layout="constrained")
    axis = figure.subplots()
    places = list(range(len(table)))[::-1]
    for place, row in zip(places, table.to_dict("records"), strict=True):
        speed = row["tokens_per_s"]
        if speed != speed:
            axis.text(0.01, place, row["outcome"], va="center", transform=axis.get_yaxis_transform())
            continue
        spread = [[speed - row["tokens_per_s_low"]], [row["tokens_per_s_high"] - speed]]
        axis.barh(place, speed, xerr=spread, color="tab:blue" if row["limited"] else "tab:gray", height=0.62)
        axis.plot(row["bound_tokens_per_s"], place, marker="|", markersize=16, color="black")
    axis.axvline(notes["ideal_tokens_per_s"], linestyle=":", color="tab:red")
    axis.set_yticks(places, table["system"])
    axis.set_xscale("log")
    axis.set_xlabel("tokens per second (median; line: smallest to largest)")
    axis.set_title(
        f"{title}\ngray: without the limit; |: bound of the system's own reads; dotted: Belady's misses", fontsize=9
    )
    return figure
