"""Routing statistics: what past tokens and prompts say about the experts of the next ones (paper, Figs 3, 7, 8, 9).

Terms
-----
shares
    How a set of (token, choice) pairs is spread over a layer's experts: float64 [L, E], each layer summing to 1.
reuse
    Share of the experts that a decoded token needs which the token ``lag`` places before it, in the same answer, needed
    too, mean over layers. *Chance* is the same between two tokens of different answers, drawn at random.
lag
    Distance in the stream, in prompts or tokens.

The paper correlates sequences of expert *numbers*, and does not say how. Numbers are labels, so what is used here
does not change when experts are renumbered: Cramer's V between the first choices of neighbouring layers, and Pearson's
correlation between the shares of two prompts, the layers' mean (1 / E) taken out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from emoe_core.experts.trace import RoutingTrace
from workbench.replay.accesses import Accesses
from workbench.replay.prediction import PromptUse


def task_shares(uses: Sequence[PromptUse]) -> dict[str, np.ndarray]:
    """Return each task's shares; every prompt weighs the same, however long it is."""
    return {
        task: np.mean([shares(use.counts) for use in uses if use.task == task], axis=0)
        for task in sorted({use.task for use in uses})
    }


def shares(counts: np.ndarray) -> np.ndarray:
    """Return counts [L, E] as shares."""
    return np.asarray(counts / counts.sum(axis=-1, keepdims=True))


def layer_transitions(trace: RoutingTrace, task: str | None = None) -> np.ndarray:
    """Count how often the first choice of a layer is followed by which first choice in the next, [L - 1, E, E].

    Parameters
    ----------
    trace : RoutingTrace
    task : str, optional
        Only the requests of this task.
    """
    first = _first_choices(trace)
    if task is not None:
        wanted = [request for request, name in trace.tasks.items() if name == task]
        first = first[np.isin(trace.request, wanted)]
    size = trace.experts
    pairs = first[:, :-1] * size + first[:, 1:]
    return np.stack([np.bincount(pair, minlength=size * size).reshape(size, size) for pair in pairs.T])


def cramers_v(table: np.ndarray) -> float:
    """Return Cramer's V of a table of counts: 0 when rows tell nothing of columns, 1 when everything."""
    rows, columns = table.sum(axis=1, keepdims=True), table.sum(axis=0, keepdims=True)
    total = table.sum()
    expected = rows * columns / total
    filled = expected > 0
    chi_squared = float((((table - expected) ** 2)[filled] / expected[filled]).sum())
    smaller = min(int((rows > 0).sum()), int((columns > 0).sum())) - 1
    return float(np.sqrt(chi_squared / total / smaller)) if smaller > 0 else 0.0


def prompt_correlation(uses: Sequence[PromptUse], lags: Sequence[int], *, same_task: bool | None = None) -> pd.Series:
    """Return the mean correlation of the shares of prompts that lie ``lag`` apart, by lag; NaN where none does.

    Parameters
    ----------
    uses : sequence of PromptUse
        In stream order.
    lags : sequence of int
    same_task : bool, optional
        Only pairs of the same task (True) or of different tasks (False).
    """
    profiles = np.stack([shares(use.counts).ravel() for use in uses])
    profiles = profiles - 1.0 / uses[0].counts.shape[1]
    norms = np.linalg.norm(profiles, axis=1, keepdims=True)
    table = (profiles / norms) @ (profiles / norms).T
    return _by_lag(table, [use.task for use in uses], lags, same_task)


def text_similarity(texts: Sequence[str], tasks: Sequence[str], lags: Sequence[int]) -> pd.Series:
    """Return the mean cosine of the word counts of texts that lie ``lag`` apart, by lag (compare Fig. 9)."""
    counted = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    words = {word: place for place, word in enumerate(sorted(set().union(*counted)))}
    rows = np.zeros((len(texts), max(len(words), 1)))
    for row, counter in zip(rows, counted, strict=True):
        for word, count in counter.items():
            row[words[word]] = count
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return _by_lag(rows @ rows.T, tasks, lags, None)


def token_reuse(accesses: Accesses, lags: Sequence[int], *, seed: int = 0) -> tuple[pd.Series, float]:
    """Return the reuse of decoded tokens by lag, and chance. Accesses must be of single requests (no batches).

    Returns
    -------
    reuse : Series
        By lag; NaN where no answer is that long.
    chance : float
        Mean over 4,000 pairs of tokens of different answers.
    """
    answer = np.cumsum(accesses.prefill)[~accesses.prefill]
    needed = accesses.needed[~accesses.prefill]
    found = {}
    for lag in lags:
        pairs = np.flatnonzero(answer[lag:] == answer[:-lag])
        found[lag] = _overlap(needed[pairs + lag], needed[pairs])
    generator = np.random.default_rng(seed)
    left, right = generator.integers(len(needed), size=(2, 4000))
    apart = answer[left] != answer[right]
    return pd.Series(found, name="reuse"), _overlap(needed[left[apart]], needed[right[apart]])


def mass_of_best(uses: Sequence[PromptUse]) -> pd.DataFrame:
    """Return the share of choices that the best experts cover, by how many are kept: who knows them best.

    Returns
    -------
    DataFrame
        Index kept (1 to E). Columns: ``own`` (the prompt's own best), ``task`` (best of its task in this stream),
        ``stream`` (best of the whole stream), ``even`` (kept / E). All but ``even`` are known in hindsight.
    """
    each = np.stack([shares(use.counts) for use in uses])
    by_task = task_shares(uses)
    orders = {
        "own": each,
        "task": np.stack([by_task[use.task] for use in uses]),
        "stream": np.broadcast_to(each.mean(axis=0), each.shape),
    }
    experts = each.shape[2]
    columns = {
        name: np.take_along_axis(each, (-order).argsort(axis=2, kind="stable"), axis=2).cumsum(axis=2).mean(axis=(0, 1))
        for name, order in orders.items()
    }
    kept = np.arange(1, experts + 1)
    return pd.DataFrame({**columns, "even": kept / experts}, index=pd.Index(kept, name="kept"))


def _first_choices(trace: RoutingTrace) -> np.ndarray:
    best = trace.weight.astype(np.float32).argmax(axis=2)
    return np.take_along_axis(trace.chosen.astype(np.int64), best[:, :, None], axis=2)[:, :, 0]


def _overlap(now: np.ndarray, before: np.ndarray) -> float:
    wanted = now.sum(axis=2)
    return float(((now & before).sum(axis=2) / wanted).mean()) if len(now) else float("nan")


def _by_lag(table: np.ndarray, tasks: Sequence[str], lags: Sequence[int], same_task: bool | None) -> pd.Series:
    names = np.asarray(tasks)
    found = {}
    for lag in lags:
        values = np.diagonal(table, offset=lag)
        if same_task is not None:
            values = values[(names[lag:] == names[: len(names) - lag]) == same_task]
        found[lag] = float(values.mean()) if len(values) else float("nan")
    return pd.Series(found)
