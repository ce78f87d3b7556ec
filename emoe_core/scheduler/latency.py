"""The latency model (paper, section 3.5, Eq. 3).

The paper expects request i, when a new request is scheduled beside it, to take

    t_i = dE + (W + n_i * G_i) * c + r_i

with dE the loading latency that the new request causes, W its input tokens, G_i the output tokens that remain of i, n_i
the running requests that finish after i, c the profiled cost per token and r_i the time that i has run.

Two things are refined here. A token of a prompt costs something else than one of a decode step, and a step of b
sequences does not take b times as long as one (b = 1: all weights are read either way), so ``c`` is profiled apart:
``prefill_s(W)`` and ``s(b)``. And requests that finish before i share i's steps until they do, which ``n_i * G_i``
leaves out. With G sorted, the batch shrinks step by step:

    t_i = r_i + dE + prefill_s(W) + sum over k with G_k <= G_i of (G_k - G_(k-1)) * s(b_k)

b_k being the sequences left in that stretch, the new one included for as long as it is expected to run. Where all
others finish after i and ``s(b) = b * c``, the sum is the paper's ``n_i * G_i * c``, n_i counting i and the new one.
"""

from __future__ import annotations

import numpy as np


class DecodeForecast:
    """How long the members of a batch will take, alone or with one more.

    Parameters
    ----------
    remaining_tokens : np.ndarray
        G of each member, float [n], above 0.
    step_s : np.ndarray
        Seconds of a step by batch size, float [more than n + 1], entry 0 being 0 (`ServingCosts.step_table_s`).
    """

    def __init__(self, remaining_tokens: np.ndarray, step_s: np.ndarray) -> None:
        order = np.sort(remaining_tokens)
        count = len(order)
        self._ends = np.concatenate(([0.0], order))
        widths = np.diff(self._ends)
        sizes = np.arange(count, 0, -1)
        self._alone = np.concatenate(([0.0], np.cumsum(widths * step_s[sizes])))
        self._joined = np.concatenate(([0.0], np.cumsum(widths * step_s[sizes + 1])))
        self._single_s = float(step_s[1])

    def alone_s(self, tokens: np.ndarray) -> np.ndarray:
        """Return the seconds until members have put out that many tokens (at most the largest G), if nobody joins."""
        return np.interp(tokens, self._ends, self._alone)

    def joined_s(self, tokens: np.ndarray) -> np.ndarray:
        """Return the seconds until one who joins now has put out that many tokens."""
        beyond = np.maximum(tokens - self._ends[-1], 0.0)
        return np.interp(tokens, self._ends, self._joined) + beyond * self._single_s

    def added_s(self, tokens: np.ndarray) -> np.ndarray:
        """Return the seconds that one who joins for that many tokens adds to a member who stays at least as long.

        What it adds to a member of G tokens is the lesser of ``added_s`` at G and at its own tokens.
        """
        return np.interp(tokens, self._ends, self._joined - self._alone)
