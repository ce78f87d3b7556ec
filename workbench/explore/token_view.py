"""Token by token: which experts a request's tokens wanted in each layer, and how they were served.

Terms. A *step* is one forward pass of a request and the token that came out of it: the first step reads the whole
prompt, each later one the token before it. Within a step, a layer's *choices* are (token, expert) pairs; each was a
hit, loaded, or rerouted to other experts (`emoe_core.metrics`).

`count_steps` counts them, `steps_table` and `step_table` list them, `step_grid` draws layers (down) by steps (across)
as SVG: a cell is split in proportion to its choices, by colour and by pattern (hits plain, loads hatched, reroutes
dotted), with a letter where there is room. All text is escaped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd

from emoe_core.errors import DataError
from emoe_core.html_view import SERVED, served_bar
from emoe_core.routing import HIT, LOAD, REROUTE, RoutingTrace

_WIDTH, _HEIGHT, _LEFT, _TOP, _LETTER = 30, 13, 62, 78, 9
_PATTERNS = (
    "",
    "<path d='M0 4L4 0M-1 1L1 -1M3 5L5 3' stroke='#000' stroke-width='.8'/>",
    "<circle cx='2' cy='2' r='.9' fill='#000'/>",
)


def count_steps(trace: RoutingTrace, request: int | None = None) -> np.ndarray:
    """Return how the choices of each step were served, int64 [steps, layers, 3]: hits, loads, reroutes.

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
    rows = _steps(trace, request)
    assert trace.outcome is not None
    return np.stack(
        [
            np.stack([(trace.outcome[step] == kind).sum(axis=(0, 2)) for kind in (HIT, LOAD, REROUTE)], axis=1)
            for step in rows
        ]
    )


def steps_table(counts: np.ndarray, pieces: Sequence[str]) -> pd.DataFrame:
    """Return one row a step: its token's text, and its hits, loads and reroutes over all layers."""
    totals = counts.sum(axis=1)
    return pd.DataFrame(
        {"token": list(pieces), "hit": totals[:, HIT], "loaded": totals[:, LOAD], "rerouted": totals[:, REROUTE]}
    )


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
    drawn = [_patterns(key)]
    totals = counts.sum(axis=0)
    for step, piece in enumerate(pieces):
        x = _LEFT + step * _WIDTH
        name = f"prompt, then {piece!r}" if step == 0 else repr(piece)
        drawn.append(_column_name(x, name, _visible(piece)))
        for layer in range(layers):
            tip = f"layer {layer}, {name}: {_words(counts[step, layer])}"
            if len(rows[step]) == 1:
                tip += f": {_choices(trace, rows[step][0], layer)}"
            drawn.append(_cell(key, x, layer, counts[step, layer], tip))
        drawn.append(
            _cell(
                key,
                x,
                layers + 0.6,
                counts[step].sum(axis=0),
                f"all layers, {name}: {_words(counts[step].sum(axis=0))}",
            )
        )
    x = _LEFT + (steps + 0.4) * _WIDTH
    drawn.append(_column_name(x, "all steps", "all steps"))
    for layer in range(layers):
        drawn.append(_row_name(layer, f"layer {layer}"))
        drawn.append(_cell(key, x, layer, totals[layer], f"layer {layer}, all steps: {_words(totals[layer])}"))
    drawn.append(_row_name(layers + 0.6, "all"))
    width, height = x + _WIDTH + 4, _TOP + (layers + 1.6) * _HEIGHT + 4
    label = f"{steps} steps by {layers} layers: {_words(counts.sum(axis=(0, 1)))}"
    return (
        f"{served_bar(counts.sum(axis=(0, 1)).tolist(), 'choices')}<div style='overflow-x:auto'>"
        f"<svg role='img' aria-label='{escape(label)}' width='{width:.0f}' height='{height:.0f}' font-size='9' "
        f"font-family='monospace' fill='currentColor'>{''.join(drawn)}</svg></div>"
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


def _cell(key: str, x: float, row: float, counts: np.ndarray, tip: str) -> str:
    y, total, left, parts = _TOP + row * _HEIGHT, max(1, int(counts.sum())), 0.0, []
    for kind, ((name, color), count) in enumerate(zip(SERVED, counts.tolist(), strict=True)):
        width = (_WIDTH - 2) * count / total
        if not count:
            continue
        place = f"x='{x + left:.1f}' y='{y:.1f}' width='{width:.1f}' height='{_HEIGHT - 2}'"
        parts.append(f"<rect {place} fill='{color}'/>")
        if _PATTERNS[kind]:
            parts.append(f"<rect {place} fill='url(#emoe-{key}-{kind})'/>")
        if width >= _LETTER:
            parts.append(_letter(x + left + width / 2, y, name[0].upper(), color))
        left += width
    return f"<g><title>{escape(tip)}</title>{''.join(parts)}</g>"


def _letter(x: float, y: float, letter: str, color: str) -> str:
    # A stroke in the part's colour keeps the pattern away from the letter.
    look = f"fill='#000' stroke='{color}' stroke-width='2.5' paint-order='stroke'"
    return f"<text x='{x:.1f}' y='{y + _HEIGHT - 4:.1f}' text-anchor='middle' {look}>{letter}</text>"


def _column_name(x: float, name: str, shown: str) -> str:
    middle = x + _WIDTH / 2 + 2
    return (
        f"<g><title>{escape(name)}</title><text transform='translate({middle:.1f} {_TOP - 5}) rotate(-90)' "
        f"font-size='11'>{escape(shown[:10])}</text></g>"
    )


def _row_name(row: float, name: str) -> str:
    return f"<text x='{_LEFT - 6}' y='{_TOP + row * _HEIGHT + _HEIGHT - 4:.1f}' text-anchor='end'>{name}</text>"


def _patterns(key: str) -> str:
    made = "".join(
        f"<pattern id='emoe-{key}-{kind}' width='4' height='4' patternUnits='userSpaceOnUse'>{drawing}</pattern>"
        for kind, drawing in enumerate(_PATTERNS)
        if drawing
    )
    return f"<defs>{made}</defs>"


def _words(counts: np.ndarray) -> str:
    return ", ".join(f"{count} {name}" for (name, _), count in zip(SERVED, counts.tolist(), strict=True))


def _visible(piece: str) -> str:
    """Return a token's text with its spaces and line ends to be seen."""
    return piece.replace(" ", "·").replace("\n", "↵").replace("\t", "→") or "∅"
