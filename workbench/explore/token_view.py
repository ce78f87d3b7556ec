"""Token by token: which experts a request's tokens wanted in each layer, and how they were served.

Terms. A *step* is one forward pass of a request and the token that came out of it: the first step reads the whole
prompt, each later one the token before it. Within a step, a layer's *choices* are (token, expert) pairs; each was a
hit, loaded, rerouted to other experts, or dropped (`emoe_core.metrics`).

`count_steps` counts them, `steps_table` and `step_table` list them, `step_grid` draws layers (down) by steps (across)
as SVG: a cell is split in proportion to its choices, by colour and by a letter, or by a pattern where there is no room
for one. All text is escaped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd

from emoe_core.errors import DataError
from emoe_core.experts.trace import DROP, HIT, LOAD, REROUTE, RoutingTrace
from workbench.explore.html_view import SERVED, is_told, served_bar
from workbench.replay.trace_statistics import outcomes

_WIDTH, _HEIGHT, _LEFT, _TOP, _LETTER = 30, 13, 62, 78, 9
_HEAD = "text-anchor='start' font-size='11'"
_PATTERNS = (
    "",
    "<path d='M0 4L4 0M-1 1L1 -1M3 5L5 3' stroke='#000' stroke-width='.8'/>",
    "<circle cx='2' cy='2' r='.9' fill='#000'/>",
    "<path d='M0 2h4' stroke='#000' stroke-width='.8'/>",
)


def count_steps(trace: RoutingTrace, request: int | None = None) -> np.ndarray:
    """Return how the choices of each step were served, int64 [steps, layers, 4]: hits, loads, reroutes, drops.

    Parameters
    ----------
    trace : RoutingTrace
        With outcomes.
    request : int, optional
        The request to look at; needed only where the trace holds several.

    Raises
    ------
    DataError
        No outcomes in the trace, or it is not clear whose steps are meant.
    """
    found = [outcomes(trace, step) for step in _steps(trace, request)]
    return np.stack([counts for counts in found if counts is not None])


def steps_table(counts: np.ndarray, pieces: Sequence[str]) -> pd.DataFrame:
    """Return one row a step: its token's text, and how its choices over all layers were served."""
    totals, places = counts.sum(axis=1), (HIT, LOAD, REROUTE, DROP)
    served = {name: totals[:, place] for (name, _), place in zip(SERVED, places, strict=True)}
    return pd.DataFrame({"token": list(pieces), **{name: n for name, n in served.items() if is_told(name, n.sum())}})


def step_table(trace: RoutingTrace, step: int, request: int | None = None) -> pd.DataFrame:
    """Return one row per layer: what each choice of a step's last token wanted and got, by falling router weight."""
    row = _steps(trace, request)[step][-1]
    assert trace.outcome is not None
    order = np.argsort(-trace.weight[row].astype(float), axis=1, kind="stable")
    return pd.DataFrame(
        {
            "layer": range(len(order)),
            "experts": [_choices(trace, row, layer, places) for layer, places in enumerate(order)],
        }
    )


def step_grid(trace: RoutingTrace, pieces: Sequence[str], request: int | None = None) -> str:
    """Return the steps as HTML: a bar of totals, and an SVG of layers by steps with a tooltip on each cell.

    Parameters
    ----------
    trace : RoutingTrace
    pieces : sequence of str
        Text of the token that each step gave.
    """
    rows, counts = _steps(trace, request), count_steps(trace, request)
    steps, layers = counts.shape[:2]
    if len(pieces) != steps:
        raise DataError(
            f"the trace has {steps} steps, but {len(pieces)} tokens were named: give the text of each token"
        )
    # Every picture has its own patterns: a page drops them with the picture they came with.
    key = hashlib.sha256(counts.tobytes() + repr(list(pieces)).encode()).hexdigest()[:8]
    columns = []
    for step, piece in enumerate(pieces):
        row = rows[step][0] if len(rows[step]) == 1 else None
        tips = [_words(counts[step, layer]) if row is None else _choices(trace, row, layer) for layer in range(layers)]
        cells = [_cell(key, layer, counts[step, layer], f"layer {layer}: {tips[layer]}") for layer in range(layers)]
        total = counts[step].sum(axis=0)
        cells.append(_cell(key, layers + 1, total, f"all layers: {_words(total)}"))
        name = f"the prompt, then {piece!r}" if step == 0 else f"step {step}: {piece!r}"
        columns.append(_column(step, name, _visible(piece), cells))
    totals = counts.sum(axis=0)
    cells = [_cell(key, layer, totals[layer], f"layer {layer}: {_words(totals[layer])}") for layer in range(layers)]
    columns.append(_column(steps + 0.5, "all steps", "all steps", cells))
    names = "".join(
        _row_name(row, name) for row, name in [*((n, f"layer {n}") for n in range(layers)), (layers + 1, "all")]
    )
    width, height = _LEFT + (steps + 1.5) * _WIDTH + 4, _TOP + (layers + 2) * _HEIGHT
    label = f"{steps} steps by {layers} layers: {_words(counts.sum(axis=(0, 1)))}"
    return (
        f"{served_bar(counts.sum(axis=(0, 1)).tolist(), 'choices')}"
        "<div style='font-size:12px'>Where no letter has room: plain is hit, hatched loaded, dotted rerouted, lined "
        "dropped."
        f"</div><div style='overflow-x:auto'><svg role='img' aria-label='{escape(label)}' width='{width:.0f}' "
        f"height='{height}' font-family='monospace' font-size='9' fill='currentColor' text-anchor='middle'>"
        f"{_patterns(key)}<g text-anchor='end'>{names}</g>{''.join(columns)}</svg></div>"
    )


def _steps(trace: RoutingTrace, request: int | None) -> list[np.ndarray]:
    """Return the trace's rows of each step of a request."""
    if trace.outcome is None:
        raise DataError("this trace does not tell how choices were served: record it with emoe_core.load(record=True)")
    known = np.unique(trace.request)
    if request is None and len(known) != 1:
        raise DataError(f"the trace holds {len(known)} requests: name one of them")
    mine = np.flatnonzero(trace.request == (known[0] if request is None else request))
    if not len(mine):
        raise DataError(f"the trace holds no request {request}: it holds {', '.join(map(str, known[:20]))}")
    mine = mine[np.argsort(trace.position[mine], kind="stable")]
    prompt = mine[trace.prefill[mine]]
    return [*([prompt] if len(prompt) else []), *(np.array([row]) for row in mine[~trace.prefill[mine]])]


def _choices(trace: RoutingTrace, row: int, layer: int, places: np.ndarray | None = None) -> str:
    assert trace.outcome is not None
    texts = []
    for place in range(trace.chosen.shape[2]) if places is None else places:
        expert, served = int(trace.chosen[row, layer, place]), int(trace.served[row, layer, place])
        name, _ = SERVED[int(trace.outcome[row, layer, place])]
        went = f"{name} to {served}" if trace.outcome[row, layer, place] == REROUTE else name
        texts.append(f"{expert} {went} ({float(trace.weight[row, layer, place]):.2f})")
    return ", ".join(texts)


def _column(place: float, name: str, shown: str, cells: Sequence[str]) -> str:
    head = f"<text transform='translate({_WIDTH / 2 + 3:g} {_TOP - 5}) rotate(-90)' {_HEAD}>{escape(shown[:10])}</text>"
    return (
        f"<g transform='translate({_LEFT + place * _WIDTH:g} 0)'><g><title>{escape(name)}</title>{head}</g>"
        f"<g fill='#000'>{''.join(cells)}</g></g>"
    )


def _cell(key: str, row: int, counts: np.ndarray, tip: str) -> str:
    y, total, left, parts = _TOP + row * _HEIGHT, max(1, int(counts.sum())), 0.0, []
    for kind, ((name, color), count) in enumerate(zip(SERVED, counts.tolist(), strict=True)):
        width = (_WIDTH - 2) * count / total
        if not count:
            continue
        lettered = width >= _LETTER
        fill = color if lettered or not _PATTERNS[kind] else f"url(#{_pattern(key, kind)})"
        parts.append(f"<path fill='{fill}' d='M{left:.3g} {y}h{width:.3g}v{_HEIGHT - 2}h-{width:.3g}z'/>")
        if lettered:
            parts.append(f"<text x='{left + width / 2:.3g}' y='{y + _HEIGHT - 4}'>{name[0].upper()}</text>")
        left += width
    return f"<g><title>{escape(tip)}</title>{''.join(parts)}</g>"


def _row_name(row: int, name: str) -> str:
    return f"<text x='{_LEFT - 6}' y='{_TOP + row * _HEIGHT + _HEIGHT - 4}'>{name}</text>"


def _patterns(key: str) -> str:
    made = "".join(
        f"<pattern id='{_pattern(key, kind)}' width='4' height='4' patternUnits='userSpaceOnUse'>"
        f"<path fill='{color}' d='M0 0h4v4h-4z'/>{drawing}</pattern>"
        for kind, ((_, color), drawing) in enumerate(zip(SERVED, _PATTERNS, strict=True))
        if drawing
    )
    return f"<defs>{made}</defs>"


def _pattern(key: str, kind: int) -> str:
    return f"emoe-{key}-{kind}"


def _words(counts: np.ndarray) -> str:
    pairs = zip(SERVED, counts.tolist(), strict=True)
    return ", ".join(f"{count} {name}" for (name, _), count in pairs if is_told(name, count))


def _visible(piece: str) -> str:
    """Return a token's text with its spaces and line ends to be seen."""
    return piece.replace(" ", "·").replace("\n", "↵").replace("\t", "→") or "∅"
