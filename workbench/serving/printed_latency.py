"""Eq. 3 as one formula: what every running request is expected to take if one more is admitted now.

The engine's scheduler never computes it: it asks a `DecodeForecast` for what a newcomer adds. This is what that must
come to, for reading and for tests.
"""

from __future__ import annotations

import numpy as np

from emoe_core.scheduler.latency import DecodeForecast


def expected_latency_s(
    elapsed_s: np.ndarray,
    remaining_tokens: np.ndarray,
    step_s: np.ndarray,
    *,
    loading_s: float,
    prefill_s: float,
    new_output_tokens: float,
) -> np.ndarray:
    """Return t_i of Eq. 3 for every running request, if one more is admitted now; seconds, float [n].

    Parameters
    ----------
    elapsed_s, remaining_tokens : np.ndarray
        r_i and G_i, float [n].
    step_s : np.ndarray
        As in `DecodeForecast`.
    loading_s, prefill_s, new_output_tokens : float
        dE, the time of the new prompt, and the new request's expected output.
    """
    forecast = DecodeForecast(remaining_tokens, step_s)
    added = np.minimum(forecast.added_s(remaining_tokens), forecast.added_s(np.array(new_output_tokens)))
    return np.asarray(elapsed_s + loading_s + prefill_s + forecast.alone_s(remaining_tokens) + added)
