"""Decides which neurons of a dense feed-forward make up which expert, and gives the routers their start.

A neuron j of the feed-forward contributes ``h_j W_d[:, j]`` to the output; its contribution on a token is the length of
that vector, ``|h_j| * |W_d[:, j]|``. Neurons that are among a token's largest contributors most often become the
shared expert. The others are clustered by their contributions over the same tokens, so that neurons which work together
lie in one expert; clusters have equal sizes. An expert's energy on a token is the sum of its squared contributions; a
router starts as the linear map that predicts the logarithm of all energies best.

The idea is CMoE's (arXiv 2502.04416); the clustering feature and the router's start are our own. Nothing here changes a
weight: with all experts active at weight one the dense feed-forward is had back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from workbench.models.reference.carved.layer import Shape

CLUSTER_ROUNDS = 8
# Share of neurons that count as a token's largest contributors.
LARGEST = 0.1
RIDGE = 0.01


def contributions(hidden: Tensor, down: Tensor) -> Tensor:
    """Return the contributions [tokens, neurons] from activations [tokens, neurons] and W_d [hidden, neurons]."""
    return hidden.abs() * down.norm(dim=0)


def carve(contribution: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return the order of neurons [neurons]: the shared expert's first, then expert by expert.

    Parameters
    ----------
    contribution : Tensor, shape [tokens, neurons]
        See `contributions`; a few thousand tokens suffice.
    shape : Shape
    generator : torch.Generator
        Decides the clusters' start.
    """
    neurons = contribution.shape[1]
    width = shape.width(neurons)
    largest = contribution.topk(max(1, int(LARGEST * neurons)), dim=1).indices
    often = torch.bincount(largest.flatten(), minlength=neurons)
    ranked = often.argsort(descending=True, stable=True)
    shared, routed = ranked[: shape.shared].sort().values, ranked[shape.shared :].sort().values
    features = functional.normalize(contribution[:, routed].T, dim=1)
    # What all neurons have in common (long tokens, loud tokens) says nothing about who works with whom.
    features = functional.normalize(features - features.mean(dim=0), dim=1)
    labels = _balanced_clusters(features, shape.experts, width, generator)
    return torch.cat([shared, routed[labels.argsort(stable=True)]])


def _balanced_clusters(features: Tensor, clusters: int, size: int, generator: torch.Generator) -> Tensor:
    """Return the cluster of each row of `features`; every cluster gets `size` rows, the closest pairs first."""
    rows = len(features)
    centres = features[torch.randperm(rows, generator=generator)[:clusters]]
    labels = torch.zeros(rows, dtype=torch.int64)
    for _ in range(CLUSTER_ROUNDS):
        closeness = features @ functional.normalize(centres, dim=1).T
        assigned, room = [-1] * rows, [size] * clusters
        for pair in closeness.flatten().argsort(descending=True, stable=True).tolist():
            row, cluster = divmod(pair, clusters)
            if assigned[row] < 0 and room[cluster]:
                assigned[row] = cluster
                room[cluster] -= 1
        labels = torch.tensor(assigned)
        centres = torch.stack([features[labels == cluster].sum(dim=0) for cluster in range(clusters)])
    return labels


def router_start(inputs: Tensor, energy: Tensor, spread: float) -> Tensor:
    """Return router weights [experts, hidden] that predict which experts have the most energy.

    Parameters
    ----------
    inputs : Tensor, shape [tokens, hidden]
    energy : Tensor, shape [tokens, experts]
    spread : float
        Standard deviation of a token's logits over experts, on average. Small: the chosen experts weigh nearly the
        same, as in the dense parent, where all weigh one.
    """
    target = energy.clamp_min(1e-12).log()
    target = target - target.mean(dim=1, keepdim=True)
    gram = inputs.T @ inputs
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram, inputs.T @ target).T
    logits = inputs @ weights.T
    return weights * (spread / logits.std(dim=1).mean())
