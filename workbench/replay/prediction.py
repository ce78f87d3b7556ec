"""How good predictors are, by replay of recorded routing through the engine's own control loop. No model runs.

A prompt's *use* is how many of its tokens (and how much router weight) went to each expert with every expert resident.
Replay admits the prompts one after another, lets the control loop predict, plan and swap over a loader that moves
nothing, and counts what the residents would have served.

Terms
-----
mass
    Share of a prompt's (token, choice) pairs whose expert is resident, mean over layers; with ``weight`` in the name,
    share of router weight.
recall
    Share of the experts that a prompt used at all which are resident, mean over layers.
oracle mass
    Mass of the best set of the same size for each prompt and layer: no predictor can exceed it.
skill
    (mass - random) / (oracle - random), random being slots / experts: 0 is guessing, 1 is hindsight.
moved, wasted
    Bytes that swaps would load after the first plan; those of experts that left (or were left at the end) unused.

Replay takes routing as recorded; that residents change what later layers see is not modelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from emoe_core.experts.trace import RoutingTrace
from emoe_core.planning.control import ControlLoop
from emoe_core.predictor import TRAINED, Predictor
from emoe_core.predictor.transformer import TransformerPredictor
from emoe_core.scheduler import Request
from workbench.predictors import PREDICTORS
from workbench.predictors.bounds import OraclePredictor
from workbench.replay.counting_loader import CountingLoader


@dataclass(frozen=True)
class PromptUse:
    """One prompt's use of experts: task, tokens, and per (layer, expert) choices and router weight, float64 [L, E]."""

    task: str
    tokens: int
    counts: np.ndarray
    weights: np.ndarray


def prompt_uses(trace: RoutingTrace, task: str | None = None) -> list[PromptUse]:
    """Return the use of every request of a trace, in the order of their numbers.

    Parameters
    ----------
    trace : RoutingTrace
        Recorded with every expert resident.
    task : str, optional
        Task type to give to all of them, as if none could be told.
    """
    layers = trace.chosen.shape[1]
    cell = np.arange(layers)[None, :, None] * trace.experts + trace.chosen.astype(np.int64)
    uses = []
    for request in sorted(trace.tasks):
        mine = trace.request == request
        flat, size = cell[mine].ravel(), layers * trace.experts
        weight = trace.weight[mine].astype(float).ravel()
        counts = np.bincount(flat, minlength=size).astype(float).reshape(layers, -1)
        weights = np.bincount(flat, weight, minlength=size).reshape(layers, -1)
        uses.append(PromptUse(task or trace.tasks[request], int(mine.sum()), counts, weights))
    return uses


class _Timed:
    """A predictor whose predictions are timed."""

    def __init__(self, predictor: Predictor) -> None:
        self.name = predictor.name
        self.seconds: list[float] = []
        self._predictor = predictor

    def observe(self, task: str, counts: np.ndarray) -> None:
        self._predictor.observe(task, counts)

    def predict(self, task: str) -> np.ndarray | None:
        started = time.perf_counter()
        shares = self._predictor.predict(task)
        self.seconds.append(time.perf_counter() - started)
        return shares


def replay(
    stream: Sequence[PromptUse],
    predictor: Predictor | None,
    *,
    slots: int,
    interval: int = 1,
    replan: str = "admission",
    expert_bytes: int = 1,
) -> tuple[dict[str, float], pd.DataFrame]:
    """Play a stream through the control loop; the predictor brings its own history.

    Parameters
    ----------
    stream : sequence of PromptUse
        At least one prompt.
    predictor : Predictor or None
        None keeps what came first.
    slots : int
        Experts that each layer may hold.
    interval, replan
        As in `EngineConfig`.
    expert_bytes : int
        Bytes of one expert.

    Returns
    -------
    summary : dict
        Means over prompts, and bytes a prompt; see the module's terms.
    prompts : DataFrame
        One row a prompt: task, mass, weight_mass, recall, oracle_mass, oracle_weight_mass, moved_bytes.
    """
    layers, experts = stream[0].counts.shape
    loader = CountingLoader(layers, experts, slots, expert_bytes)
    timed = None if predictor is None else _Timed(predictor)
    control = ControlLoop(loader, timed, interval, replan, None)
    rows, first_fill = [], 0
    for use in stream:
        before, cold = loader.counters.bytes_loaded, control.plan is None
        request = Request(use.task, use.tokens)
        control.admit([request])
        moved = loader.counters.bytes_loaded - before
        if cold:
            first_fill, moved = first_fill + moved, 0
        # Free slots are filled as an engine fills them at the start; that is nobody's prediction.
        before = loader.counters.bytes_loaded
        resident = loader.serve(use.counts)
        first_fill += loader.counters.bytes_loaded - before
        rows.append({"task": use.task, **_served(use, resident, slots), "moved_bytes": moved})
        request.counts += use.counts
        control.finish([request])
    loader.close()
    frame = pd.DataFrame(rows)
    summary = {name: float(frame[name].mean()) for name in frame.columns if name not in ("task", "moved_bytes")}
    random = slots / experts
    summary["of_oracle"] = summary["mass"] / summary["oracle_mass"]
    summary["skill"] = _skill(summary["mass"], summary["oracle_mass"], random)
    summary["weight_skill"] = _skill(summary["weight_mass"], summary["oracle_weight_mass"], random)
    summary["moved_bytes"] = (loader.counters.bytes_loaded - first_fill) / len(stream)
    summary["wasted_bytes"] = loader.counters.wasted_bytes / len(stream)
    summary["predictions"] = float(loader.counters.predictions)
    summary["swaps"] = float(loader.counters.swaps)
    seconds = timed.seconds if timed is not None and timed.seconds else [0.0]
    for name, quantile in (("median", 0.5), ("p10", 0.1), ("p90", 0.9)):
        summary[f"prediction_{name}_s"] = float(np.quantile(seconds, quantile))
    return summary, frame


def _served(use: PromptUse, resident: np.ndarray, slots: int) -> dict[str, float]:
    used = use.counts > 0
    routed = used.any(axis=1)
    row = {"recall": float(((used & resident).sum(axis=1)[routed] / used.sum(axis=1)[routed]).mean())}
    for name, values in (("mass", use.counts), ("weight_mass", use.weights)):
        shares = values[routed] / values[routed].sum(axis=1, keepdims=True)
        row[name] = float((shares * resident[routed]).sum(axis=1).mean())
        row[f"oracle_{name}"] = float(np.sort(shares, axis=1)[:, ::-1][:, :slots].sum(axis=1).mean())
    return row


def _skill(mass: float, oracle: float, random: float) -> float:
    return (mass - random) / (oracle - random) if oracle > random else 1.0


Factory = Callable[[], Predictor]


def factories(
    layers: int, experts: int, seed: int = 0, trained: Mapping[str, Path] | None = None
) -> dict[str, Factory]:
    """Return a factory of every predictor by name, and of the trained ones whose file exists.

    Parameters
    ----------
    layers, experts, seed : int
        MoE layers, experts of the largest layer, and what random ones draw from.
    trained : mapping of str to Path, optional
        Files of trained predictors by variant; they are called ``transformer A`` and so on.
    """
    made: dict[str, Factory] = {name: partial(make, layers, experts, seed) for name, make in PREDICTORS.items()}
    for variant, path in (trained or {}).items():
        if path.exists():
            made[f"{TRAINED} {variant}"] = TransformerPredictor.load(path).fresh
    return made


def compare(
    factories: Mapping[str, Factory],
    streams: Mapping[str, Sequence[PromptUse]],
    *,
    slots: Sequence[int],
    intervals: Sequence[int] = (1,),
    warm: Sequence[PromptUse] = (),
    replan: str = "admission",
    expert_bytes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Replay every predictor on every stream; return one row each, with `replay`'s summary.

    Parameters
    ----------
    factories : mapping of str to callable
        Makes a predictor without history. The oracle is added: it knows each stream.
    streams : mapping of str to sequence of PromptUse
    slots, intervals : sequence
        Slots a layer, and prediction intervals to try.
    warm : sequence of PromptUse
        Prompts that every predictor observes first; empty is a cold start.
    replan, expert_bytes
        As in `replay`.
    progress : callable, optional
        Called with (replays done, replays in all).
    """
    rows: list[dict[str, object]] = []
    total = (len(factories) + 1) * len(streams) * len(slots) * len(intervals)
    for mix, stream in streams.items():
        for interval in intervals:
            for kept in slots:
                for name, predictor in _predictors(factories, stream, warm, interval):
                    options = {"slots": kept, "interval": interval}
                    summary, _ = replay(stream, predictor, replan=replan, expert_bytes=expert_bytes, **options)
                    rows.append({"predictor": name, "mix": mix, **options, **summary})
                    if progress is not None:
                        progress(len(rows), total)
    return pd.DataFrame(rows)


def _predictors(
    factories: Mapping[str, Factory], stream: Sequence[PromptUse], warm: Sequence[PromptUse], interval: int
) -> list[tuple[str, Predictor]]:
    made: list[tuple[str, Predictor]] = []
    for name, factory in factories.items():
        predictor = factory()
        for use in warm:
            predictor.observe(use.task, use.counts)
        made.append((name, predictor))
    return [*made, ("oracle", OraclePredictor([(use.task, use.counts) for use in stream], interval))]


def next_element_scores(
    predictor: Predictor, stream: Sequence[PromptUse], *, top_k: int, warm: Sequence[PromptUse] = ()
) -> dict[str, float]:
    """Score a predictor as a classifier of the next prompt's experts, the way Table 2 of the paper does.

    The paper does not say what an element is. Here it is a (prompt, layer): the true label set is the layer's ``top_k``
    most used experts, the predicted one the ``top_k`` of the highest predicted share.

    Returns
    -------
    dict
        ``accuracy``: share of elements whose most used expert is predicted first. ``precision``, ``recall``, ``f1``:
        of the label sets, mean over experts (an expert that is never predicted, or never true, counts as 0 where it is
        undefined). ``prediction_median_s``: median time of a prediction. Prompts without a prediction are left out.
    """
    for use in warm:
        predictor.observe(use.task, use.counts)
    first, true_sets, predicted_sets, seconds = [], [], [], []
    for use in stream:
        started = time.perf_counter()
        shares = predictor.predict(use.task)
        seconds.append(time.perf_counter() - started)
        if shares is not None:
            first.append(shares.argmax(axis=1) == use.counts.argmax(axis=1))
            true_sets.append(_top(use.counts, top_k))
            predicted_sets.append(_top(shares, top_k))
        predictor.observe(use.task, use.counts)
    true, predicted = np.concatenate(true_sets), np.concatenate(predicted_sets)
    both = (true & predicted).sum(axis=0)
    precision = both / np.maximum(predicted.sum(axis=0), 1)
    recall = both / np.maximum(true.sum(axis=0), 1)
    f1 = 2 * both / np.maximum(predicted.sum(axis=0) + true.sum(axis=0), 1)
    return {
        "accuracy": float(np.mean(first)),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "prediction_median_s": float(np.median(seconds)),
    }


def _top(values: np.ndarray, kept: int) -> np.ndarray:
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-values, axis=1, kind="stable")[:, :kept], True, axis=1)
    return chosen
