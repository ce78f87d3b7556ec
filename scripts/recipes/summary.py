"""Figures of a mixture from its losses and its choices of experts.

Terms: the share of an expert is its part of all top-k choices of a layer over equally long text of every domain; the
best half of a block are the experts that it chose most often, half of all; NMI is the mutual information of domain and
chosen expert over the mean of their entropies.
"""

from __future__ import annotations

import numpy as np


def summarise(names: list[str], tokens: np.ndarray, base: np.ndarray, mixed: np.ndarray, counts: np.ndarray) -> dict:
    """Turn losses and choice counts into the figures.

    Parameters
    ----------
    names : list of str
        Domains.
    tokens, base, mixed : numpy.ndarray, shape [domains]
        Predicted tokens, and mean negative log-likelihood (nats a token) of the parent and of the mixture.
    counts : numpy.ndarray, shape [domains, blocks, layers, experts]
        How often each expert was chosen in each block.
    """
    ratio = np.exp(mixed - base)
    by_domain = counts.sum(axis=1).astype(float)
    shares = by_domain / by_domain.sum(axis=2, keepdims=True)
    overall = shares.mean(axis=0)
    experts = counts.shape[-1]
    ordered = np.sort(counts, axis=-1)[..., ::-1]
    best = ordered[..., : experts // 2].sum(axis=-1) / counts.sum(axis=-1)
    return {
        "domains": {
            name: {
                "tokens": int(tokens[i]),
                "dense_perplexity": float(np.exp(base[i])),
                "perplexity": float(np.exp(mixed[i])),
                "ratio": float(ratio[i]),
                "best_half_mass": float(best[i].mean()),
            }
            for i, name in enumerate(names)
        },
        "domains_below_dense": int((ratio < 1).sum()),
        "worst_ratio": float(ratio.max()),
        "best_half_mass": float(best.mean()),
        "layers": {
            "min_share": [float(value) for value in overall.min(axis=1)],
            "nmi": [normalised_mutual_information(shares[:, layer]) for layer in range(shares.shape[1])],
        },
        "shares": np.round(shares, 5).tolist(),
    }


def normalised_mutual_information(shares: np.ndarray) -> float:
    """Return the NMI of domain and expert for one layer.

    Parameters
    ----------
    shares : numpy.ndarray, shape [domains, experts]
        Share of each expert within each domain; domains weigh the same.

    Returns
    -------
    float
        0 when experts say nothing about the domain, 1 when one decides the other.
    """
    joint = shares / shares.sum()
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    filled = joint > 0
    information = (joint[filled] * np.log(joint[filled] / np.outer(rows, columns)[filled])).sum()
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (rows, columns)]
    return float(information / np.mean(entropies)) if min(entropies) > 0 else 0.0
