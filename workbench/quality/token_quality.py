"""How far a run's outputs are from the all-resident model's, and how sure we are.

Primary, teacher-forced on the all-resident model's own continuation of n tokens:

* KL divergence, mean over tokens, in nats: sum_v p(v) (log p(v) - log q(v)), p the reference, q the run;
* perplexity ratio: exp(mean over tokens of (log p(y) - log q(y))), y the given token; 1 is equal, above 1 is worse;
* top-1 agreement: share of tokens where both distributions have the same most likely token.

Secondary: cosine similarity of sentence embeddings of the generated texts (the paper's accuracy). A control that is
compared with itself reads exactly 0, 1, 1 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# Below so many prompts (or pairs) there is no interval: few values say nothing of those that are not there.
LEAST_PROMPTS = 8


@dataclass(frozen=True)
class TokenQuality:
    """Per-token comparison of one continuation: float32 [n] each, ``agree`` bool [n]."""

    kl_nats: np.ndarray
    log_ratio_nats: np.ndarray
    agree: np.ndarray

    def __len__(self) -> int:
        return len(self.kl_nats)

    def row(self) -> dict[str, float]:
        """Return the number of tokens and the means over them, as a table of prompts has it."""
        return {
            "output_tokens": len(self),
            "kl_nats": float(self.kl_nats.mean()),
            "log_ratio_nats": float(self.log_ratio_nats.mean()),
            "top1_agreement": float(self.agree.mean()),
        }


def compare(reference_logits: torch.Tensor, run_logits: torch.Tensor, tokens: torch.Tensor) -> TokenQuality:
    """Compare two output distributions over the same n tokens.

    Parameters
    ----------
    reference_logits, run_logits : torch.Tensor
        [n, vocabulary], before softmax.
    tokens : torch.Tensor
        int64 [n], the tokens of the continuation.
    """
    assert reference_logits.shape == run_logits.shape, (reference_logits.shape, run_logits.shape)
    log_p = reference_logits.double().log_softmax(dim=-1)
    log_q = run_logits.double().log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    given = tokens.unsqueeze(-1)
    ratio = (log_p.gather(1, given) - log_q.gather(1, given)).squeeze(-1)
    agree = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
    return TokenQuality(kl.float().numpy(), ratio.float().numpy(), agree.numpy())


def perplexity_ratio(log_ratio_nats: np.ndarray) -> float:
    """Return exp of the mean log-probability lost per token."""
    return float(np.exp(np.mean(log_ratio_nats)))


def bootstrap_interval(
    values: np.ndarray, weights: np.ndarray | None = None, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a (weighted) mean over prompts; NaN below `LEAST_PROMPTS` of them.

    Parameters
    ----------
    values : np.ndarray
        One value a prompt, [m].
    weights : np.ndarray, optional
        Weight of each prompt (its tokens), [m].
    """
    return percentile_interval(bootstrap_means(values, weights, draws=draws, seed=seed), level)


def bootstrap_means(
    values: np.ndarray, weights: np.ndarray | None = None, *, draws: int = 2000, seed: int = 0
) -> np.ndarray:
    """Return (weighted) means of resampled prompts, float64 [draws]; equal seeds and lengths draw the same prompts.

    Every interval of the bench is made of them: below `LEAST_PROMPTS` prompts they are NaN, and so is what follows.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < LEAST_PROMPTS:
        return np.full(draws, np.nan)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return np.asarray((values[picks] * weights[picks]).sum(axis=1) / weights[picks].sum(axis=1))


def percentile_interval(means: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the middle `level` of resampled means; NaN where there are none."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
