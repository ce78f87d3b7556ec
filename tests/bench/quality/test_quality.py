"""Intervals of the bench: none is drawn from few prompts, whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from workbench.compare.change import paired_change
from workbench.quality.experiment import quality_metrics
from workbench.quality.token_quality import LEAST_PROMPTS, bootstrap_interval
from workbench.quality.variants import paired_difference

Ends = tuple[float, float]


def _requests(prompts: int) -> pd.DataFrame:
    loss = np.linspace(0.1, 0.4, prompts)
    table = {"request": range(prompts), "task": "qa", "output_tokens": 4, "log_ratio_nats": loss, "kl_nats": loss}
    return pd.DataFrame(table).assign(top1_agreement=0.9)


def _mean(prompts: int) -> Ends:
    return bootstrap_interval(_requests(prompts)["kl_nats"].to_numpy())


def _quality(prompts: int) -> Ends:
    found = quality_metrics(_requests(prompts))
    return found["perplexity_ratio_low"], found["perplexity_ratio_high"]


def _paired(prompts: int) -> Ends:
    both = _requests(prompts)
    table = pd.concat([both.assign(label="a"), both.assign(label="b", kl_nats=both["kl_nats"] ** 2)])
    return paired_difference(table, "b", "a", "kl_nats")[1:]


def _change(prompts: int) -> Ends:
    values = _requests(prompts)["kl_nats"].to_numpy()
    found = paired_change("kl_nats", values, values**2)
    assert np.isnan(found.low) == np.isnan(found.ratio_low) == np.isnan(found.ratio_high)
    return found.low, found.high


def _geometric(prompts: int) -> Ends:
    values = _requests(prompts)["kl_nats"].to_numpy()
    found = paired_change("kl_nats", values, values**2, geometric=True)
    return found.ratio_low, found.ratio_high


@pytest.mark.parametrize("interval", [_mean, _quality, _paired, _change, _geometric])
def test_an_interval_is_drawn_from_eight_prompts_on(interval: Callable[[int], Ends]) -> None:
    assert LEAST_PROMPTS == 8
    assert np.isnan(interval(LEAST_PROMPTS - 1)).all()
    low, high = interval(LEAST_PROMPTS)
    assert low < high
