"""Figures and closing table of recorded routing (Figs. 3, 7 to 9) and of the cache that is simulated on it.

Tables are those of `replay.pattern_tables`. Nothing here measures.
"""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from workbench.paper.figures import say_n
from workbench.replay.pattern_tables import EVERY_TASK
from workbench.tracking.findings import Findings

FEWEST_TOKENS = 20
BOUNDS = {"lru": ("LRU", "o", "-"), "min": ("Belady's MIN (hindsight)", "^", "--"), "random": ("random", "x", ":")}


def share_maps(table: pd.DataFrame, prompts: int) -> Figure:
    """Draw which expert each task uses in which layer; a dash of colour per (layer, expert), one scale for all."""
    tasks = sorted(table["task"].unique())
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.8, 2.4 * rows + 0.6), layout="constrained", dpi=96)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.ravel()[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.ravel(), tasks, strict=False):
        shares = table[table["task"] == task].pivot(index="expert", columns="layer", values="share")
        image = axis.imshow(
            shares, aspect="auto", cmap="cividis", vmin=0, vmax=table["share"].max(), interpolation="nearest"
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(task, fontsize=11, loc="left")
        axis.grid(visible=False)
    say_n(axes[0, columns - 1], prompts)
    figure.supxlabel("MoE layer", fontsize=11)
    figure.supylabel("expert", fontsize=11)
    figure.colorbar(image, ax=axes, label="share of the task's choices", shrink=0.8)
    return figure


def transition_map(table: pd.DataFrame, prompts: int) -> Figure:
    """Draw, per task, where tokens go from each expert of one layer; rows of few tokens are blank (compare Fig. 3)."""
    tasks, layer = list(table["task"].unique()), int(table["layer"].iloc[0])
    figure = Figure(figsize=(3.6 * len(tasks) + 1.0, 3.8), layout="constrained", dpi=96)
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axis, task in zip(axes, tasks, strict=True):
        counts = table[table["task"] == task].pivot(index="expert", columns="next_expert", values="tokens")
        total = counts.sum(axis=1)
        shares = counts.div(total.where(total >= FEWEST_TOKENS), axis=0)
        image = axis.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(task, fontsize=11, loc="left")
        axis.set_xlabel(f"first choice in layer {layer + 1}")
        axis.grid(visible=False)
    say_n(axes[-1], prompts)
    axes[0].set_ylabel(f"first choice in layer {layer}")
    figure.colorbar(image, ax=axes, label="share of the row's tokens", shrink=0.8)
    return figure


def lag_figure(by_lag: pd.DataFrame, reuse: pd.DataFrame, prompts: int) -> Figure:
    """Draw likeness over distance: of prompts, one line a measure and stream, and of decoded tokens."""
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=96)
    axes = figure.subplots(1, 2)
    palette = sns.color_palette("colorblind")
    for place, name in enumerate(by_lag.columns.drop("lag")):
        axes[0].plot(by_lag["lag"], by_lag[name], marker="osD^vP"[place % 6], color=palette[place], label=name)
    axes[0].set_xlabel("distance in the stream (prompts)")
    axes[0].set_ylabel("mean correlation or cosine")
    axes[0].legend(frameon=False, fontsize=9)
    axes[1].plot(reuse["lag"], reuse["reuse"], marker="o", color=palette[0], label="same answer")
    axes[1].plot(reuse["lag"], reuse["chance"], color="0.4", linestyle=":", linewidth=1.4, label="different answers")
    axes[1].set_xlabel("distance (tokens)")
    axes[1].set_ylabel("share of a token's experts used again")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[1].legend(frameon=False, fontsize=9)
    say_n(axes[1], prompts)
    for axis in axes:
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def mass_figure(mass: pd.DataFrame, prompts: int) -> Figure:
    """Draw how much of a prompt's choices the best experts cover, by who chose them (`patterns.mass_of_best`)."""
    names = {
        "own": "best of the prompt itself",
        "task": "best of its task",
        "stream": "best of the stream",
        "even": "even routing",
    }
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=96)
    axis = figure.subplots()
    palette = sns.color_palette("colorblind")
    for place, (name, label) in enumerate(names.items()):
        look = {"color": "0.4"} if name == "even" else {"color": palette[place]}
        # Curves may coincide: each can be seen through the next one's line.
        look |= {"linestyle": ("-", "--", "-.", ":")[place], "marker": "osD."[place], "markersize": 9 - 2 * place}
        axis.plot(mass["kept"], mass[name], label=label, **look)
    say_n(axis, prompts)
    axis.set_xlabel("experts kept in each layer")
    axis.set_ylabel("share of choices covered")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(0, 1.03)
    axis.legend(frameon=False)
    return figure


def miss_curves(found: pd.DataFrame, prompts: int) -> Figure:
    """Draw misses over slots, a panel a stream: the best policy between LRU and the bound (`cache.simulate`)."""
    policies = ["lru", best_policy(found), "min", "random"]
    streams = sorted(found["stream"].unique())
    figure = Figure(figsize=(5.4 * len(streams), 4.4), layout="constrained", dpi=96)
    axes = figure.subplots(1, len(streams), squeeze=False, sharey=True)[0]
    palette = sns.color_palette("colorblind")
    for axis, stream in zip(axes, streams, strict=True):
        for place, policy in enumerate(policies):
            part = found[(found["stream"] == stream) & (found["policy"] == policy)].sort_values("slots")
            label, marker, line = BOUNDS.get(policy, (policy.replace("_", " "), "s", "-"))
            axis.plot(
                part["slots"], part["misses"] / part["lookups"], marker=marker, linestyle=line, color=palette[place],
                label=label,
            )  # fmt: skip
        axis.set_title(f"{stream} stream", fontsize=11, loc="left")
        axis.set_xlabel("slots in each layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    say_n(axes[-1], prompts)
    # Panels share the axis, so its limits are set once all of them are drawn: a limit set earlier cuts later curves.
    axes[0].set_ylim(0, 1.05 * float((found["misses"] / found["lookups"])[found["policy"].isin(policies)].max()))
    axes[0].set_ylabel("misses per expert lookup")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def best_policy(simulation: pd.DataFrame) -> str:
    """Return the online policy that closes most of the gap between LRU and the bound, mean over streams and sizes."""
    return str(_online(simulation).groupby("policy")["gap_closed"].mean().idxmax())


def _online(simulation: pd.DataFrame) -> pd.DataFrame:
    return simulation[~simulation["policy"].isin(BOUNDS)]


def association_table(association: pd.DataFrame) -> pd.DataFrame:
    """Return mean, least and largest Cramer's V over neighbouring layers, of all tokens and of each task's."""
    table = association.groupby("of", sort=False)["cramers_v"].agg(["mean", "min", "max"])
    return table.reset_index()


def pattern_metrics(found: Findings) -> dict[str, float]:
    """Return loads and closed gap of every policy, and what routing has in common from layer to layer and prompt."""
    metrics: dict[str, float] = {}
    for row in found["simulation"].to_dict("records"):
        name = f"{row['stream']}_{row['slots']:g}_slots_{row['policy']}"
        metrics[f"{name}_loads"] = row["loads"]
        if pd.notna(row["gap_closed"]):
            metrics[f"{name}_gap_closed"] = row["gap_closed"]
    nearest = found["by_lag"].set_index("lag").loc[1]
    return metrics | {
        "layer_association": _of_all(found)["cramers_v"].mean(),
        "token_reuse_lag_1": found["reuse"].set_index("lag").loc[1, "reuse"],
        "token_reuse_chance": found["reuse"]["chance"].iloc[0],
        "prompt_correlation_sticky": nearest["routing, sticky"],
        "prompt_correlation_uniform": nearest["routing, uniform"],
        "mass_own_half": _half(found["mass"])["own"],
    }


def _of_all(found: Findings) -> pd.DataFrame:
    return found["association"][found["association"]["of"] == EVERY_TASK]


def _half(mass: pd.DataFrame) -> pd.Series:
    return mass.set_index("kept").loc[len(mass) // 2]


def beside_paper(found: Findings) -> pd.DataFrame:
    """Return the table "paper, here, why they differ" for Figs. 3 and 7 to 9, with this run's figures."""

    def span(values: pd.Series) -> str:
        return f"{values.min():.2f} to {values.max():.2f}"

    layers, by_lag, half = _of_all(found)["cramers_v"], found["by_lag"], _half(found["mass"])
    best = best_policy(found["simulation"])
    closed = found["simulation"].set_index("policy").loc[best, "gap_closed"]
    rows = [
        (
            "Fig. 3, transitions between layers",
            "strong pattern, no number",
            f"Cramer's V {span(layers)}",
            "a measure that renumbering experts does not change",
        ),
        (
            "Fig. 7, consecutive layers",
            "about 0.50",
            f"V {layers.mean():.2f} (mean)",
            "the paper correlates expert numbers, which are labels",
        ),
        (
            "Fig. 8, consecutive prompts",
            "0.40 to 0.60 (OpenMoE), 0.75 to 0.95 (Mixtral)",
            f"sticky {by_lag['routing, sticky'].iloc[0]:.2f}, uniform {by_lag['routing, uniform'].iloc[0]:.2f}",
            "sticky and uniform differ by how often the next prompt has the same task",
        ),
        (
            "Fig. 9, content, 1 to 20 prompts on",
            "0.48 to 0.55",
            f"words: sticky {span(by_lag['words, sticky'])}, uniform {span(by_lag['words, uniform'])}",
            "cosine of word counts; the paper names no measure",
        ),
        (
            f"mass of the prompt's best {half.name} of {len(found['mass'])}",
            "not given",
            f"{half['own']:.1%}",
            f"best of the task {half['task']:.1%}, of the stream {half['stream']:.1%}",
        ),
        (
            "gap LRU to MIN closed online",
            "not given",
            f"{best}: {closed.min():.0%} to {closed.max():.0%}",
            "the paper has no eviction policy: residents change between prompts only",
        ),
    ]
    return pd.DataFrame(rows, columns=["what", "paper", "here", "why they differ"])
