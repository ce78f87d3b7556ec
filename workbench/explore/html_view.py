"""Pieces of HTML that objects show of themselves in a notebook: tables, bars of parts, maps of layers by experts.

Plain strings with inline styles, no scripts. Text takes the page's colour and surfaces are left to it, so that a light
and a dark page both read well; the colours that carry a meaning have black text on them and stand beside a letter, so
that nothing is told by colour alone. All text is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

# Distinguishable with any colour vision (seaborn's "colorblind"), and light enough for black text.
GREEN, ORANGE, PINK, BLUE, GREY = "#029e73", "#de8f05", "#cc78bc", "#56b4e9", "#949494"
SERVED = (("hit", GREEN), ("loaded", ORANGE), ("rerouted", PINK), ("dropped", BLUE))
LEVELS = 8
_MAP_WIDTH, _MAP_HEIGHT, _CELL = 640, 240, 14


@dataclass(frozen=True)
class Part:
    """One part of a bar: its name, its share of the whole in [0, 1], its value as text, and its colour."""

    name: str
    share: float
    text: str
    color: str


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Return (term, value) rows as a table; floats with four significant digits."""
    cells = "".join(
        f"<tr><td style='text-align:left'>{escape(str(term))}</td>"
        f"<td style='text-align:right'>{escape(f'{value:.4g}' if isinstance(value, float) else str(value))}</td></tr>"
        for term, value in rows
    )
    # Pages without a doctype do not let tables take the colour around them.
    return f"<table style='color:inherit'>{cells}</table>"


def heading(name: str, rest: str = "") -> str:
    """Return a line that says what is shown."""
    return f"<p style='margin:4px 0'><b>{escape(name)}</b> {escape(rest)}</p>"


def folded(summary: str, inner: str) -> str:
    """Return HTML that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def bar(parts: Sequence[Part], label: str) -> str:
    """Return a horizontal bar of parts with a legend below; the first letter of a part's name stands in it."""
    pieces = "".join(
        f"<span title='{escape(part.name)}: {escape(part.text)}' style='flex:{part.share:.4f} 0 0;min-width:0;"
        f"overflow:hidden;background:{part.color};color:#000;text-align:center'>"
        f"{escape(part.name[:1].upper()) if part.share >= 0.03 else ''}</span>"
        for part in parts
        if part.share > 0
    )
    legend = " ".join(
        f"<span style='white-space:nowrap;margin-right:12px'><span style='background:{part.color};color:#000;"
        f"padding:0 4px'>{escape(part.name[:1].upper())}</span> {escape(part.name)} {escape(part.text)}</span>"
        for part in parts
    )
    return (
        f"<div role='img' aria-label='{escape(label)}' style='display:flex;max-width:{_MAP_WIDTH}px;height:18px;"
        f"line-height:18px;font-size:11px'>{pieces}</div>"
        f"<div style='font-size:12px;margin:2px 0 6px'>{legend}</div>"
    )


def is_told(name: str, count: int) -> bool:
    """Say whether a way to be served is worth a word: drops only where there are any."""
    return bool(count) or name != "dropped"


def served_bar(counts: Sequence[int], unit: str) -> str:
    """Return how experts were served, as a bar: hits, loads, reroutes, drops (terms in `metrics.py`), in this order."""
    total = max(1, sum(counts))
    parts = [
        Part(name, count / total, f"{count:,} ({count / total:.1%})", color)
        for (name, color), count in zip(SERVED, counts, strict=True)
        if is_told(name, count)
    ]
    return bar(parts, f"{unit}: " + ", ".join(f"{part.text} {part.name}" for part in parts))


def layer_map(values: np.ndarray, marked: np.ndarray | None, label: str, note: str) -> str:
    """Return a map of MoE layers (across) by experts (down).

    Parameters
    ----------
    values : np.ndarray
        [layers, experts], 0 or more; a cell is the fuller the closer it comes to the largest.
    marked : np.ndarray or None
        Bool [layers, experts]: cells that get a frame.
    label : str
        What the map is, for those who do not see it.
    note : str
        Said below.
    """
    layers, experts = values.shape
    size = max(2.0, min(_CELL, _MAP_WIDTH / layers, _MAP_HEIGHT / experts))
    top = float(values.max()) if values.size else 0.0
    # One path a level, not one element a cell: models with thousands of experts stay below some hundred kB.
    level = np.ceil(values / top * LEVELS).astype(int) if top > 0 else np.zeros(values.shape, dtype=int)
    drawn = [
        f"<path fill='{BLUE}' fill-opacity='{step / LEVELS:.3g}' d='{_squares(level == step, 0.06)}'/>"
        for step in range(1, LEVELS + 1)
        if (level == step).any()
    ]
    if marked is not None and marked.any():
        drawn.append(f"<path fill='none' stroke='currentColor' stroke-width='.12' d='{_squares(marked, 0.12)}'/>")
    return (
        f"<svg role='img' aria-label='{escape(label)}' viewBox='0 0 {layers} {experts}' width='{layers * size:.0f}' "
        f"style='max-width:100%;height:auto;outline:1px solid rgba(128,128,128,.4)'>{''.join(drawn)}</svg>"
        f"<div style='font-size:12px'>MoE layers 0 to {layers - 1} across, experts 0 to {experts - 1} down. "
        f"{escape(note)}</div>"
    )


def _squares(where: np.ndarray, margin: float) -> str:
    side = 1 - 2 * margin
    return "".join(
        f"M{layer + margin:.4g} {expert + margin:.4g}h{side:.4g}v{side:.4g}h-{side:.4g}z"
        for layer, expert in np.argwhere(where).tolist()
    )


def bytes_text(count: float) -> str:
    """Return bytes as decimal megabytes."""
    return f"{count / 10**6:,.1f} MB"
