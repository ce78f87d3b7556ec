"""How one metric changed from A to B over pairs, and how sure that is.

Terms: a *pair* is one prompt that both runs had, or one configuration that both sweeps ran. The difference is B - A and
the ratio B / A. Intervals are percentile bootstrap intervals over pairs (95%); resampling keeps pairs together, so
that what is hard for both does not count as noise. Below `quality.LEAST_PROMPTS` pairs there is none. The interval
speaks of other prompts of the same kind, not of other machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from workbench.metrics.catalogue import metric_of
from workbench.quality.token_quality import bootstrap_means, percentile_interval
from workbench.tracking.store import finite

NAN = float("nan")


@dataclass(frozen=True)
class Change:
    """One metric in A and in B.

    Attributes
    ----------
    metric, variant : str
        ``variant`` tells apart what one notebook run compared inside itself; empty where it did not.
    a, b : float
        Means over pairs, or the single values.
    difference, low, high : float
        B - A and its interval; NaN without one.
    ratio, ratio_low, ratio_high : float
        B / A and its interval; NaN where a value is not positive.
    pairs : int
        How many pairs; 1 for a single value a run.
    identical : bool
        Whether every pair holds the same value twice.
    by_prompt : bool
        Whether A and B are values of the same prompts, however many others the runs had.
    """

    metric: str
    variant: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    identical: bool
    by_prompt: bool = False

    @property
    def verdict(self) -> str:
        """Return what can be said in words."""
        if self.identical:
            return "equal"
        if math.isnan(self.low):
            return "one value each, no interval" if self.pairs == 1 else f"{self.pairs} pairs, too few for an interval"
        if self.low <= 0 <= self.high:
            return "no difference can be told"
        direction = metric_of(self.metric).better * (1 if self.low > 0 else -1)
        judged = {1: ", better", -1: ", worse", 0: ""}[direction]
        return f"B is {'higher' if self.low > 0 else 'lower'}{judged}"

    def to_dict(self) -> dict[str, Any]:
        """Return the change as JSON has it: numbers that do not exist are null."""
        return finite(asdict(self)) | {"verdict": self.verdict}


def paired_change(
    metric: str,
    a: np.ndarray,
    b: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    variant: str = "",
    scale: Callable[[Any], Any] | None = None,
    geometric: bool = False,
    by_prompt: bool = False,
) -> Change:
    """Return how a metric changed over pairs.

    Parameters
    ----------
    metric : str
    a, b : np.ndarray
        One value a pair, [n] each, n at least 1, without NaN.
    weights : np.ndarray, optional
        Weight of each pair (its tokens), [n].
    variant : str
    scale : callable, optional
        Applied to means, not to values: ``np.exp`` turns a mean log ratio into a perplexity ratio.
    geometric : bool
        Whether the ratio is the geometric mean of the pairs' ratios instead of the ratio of means: for pairs of very
        different size, where the largest would decide alone.
    by_prompt : bool
        Whether a pair is a prompt (or, over sweeps, a mean over the same prompts).
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    shown = scale or (lambda mean: mean)
    mean_a, mean_b = (float(shown(np.average(values, weights=weights))) for values in (a, b))
    positive = bool((a > 0).all() and (b > 0).all()) if geometric else mean_a > 0 and mean_b > 0
    ratio = NAN
    if positive:
        ratio = float(np.exp(np.mean(np.log(b / a)))) if geometric else mean_b / mean_a
    ratio_interval = (NAN, NAN)
    drawn_a, drawn_b = (shown(bootstrap_means(values, weights)) for values in (a, b))
    interval = percentile_interval(drawn_b - drawn_a)
    if positive and geometric:
        low, high = percentile_interval(bootstrap_means(np.log(b / a)))
        ratio_interval = (math.exp(low), math.exp(high))
    elif positive and (drawn_a > 0).all():
        ratio_interval = percentile_interval(drawn_b / drawn_a)
    return Change(
        metric, variant, mean_a, mean_b, mean_b - mean_a, *interval, ratio, *ratio_interval,
        pairs=len(a), identical=bool((a == b).all()), by_prompt=by_prompt,
    )  # fmt: skip
