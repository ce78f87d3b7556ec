"""Which layers a task may skip: two rules that make the mask ``s`` of Eq. 2 from a measured profile.

By similarity, the paper's (section 3.4): leading layers whose random routing keeps the output. By divergence, ours:
layers whose divergences, taken alone and added up, stay within an allowance. A mask has one entry a MoE layer, True
where the task is sensitive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from emoe_core.planning.tasks import DEFAULT_SIMILARITY_THRESHOLD, ProfileError, TaskProfile


def mask_by_similarity(task: TaskProfile, threshold: float) -> tuple[bool, ...]:
    """Return the paper's mask; a task without a curve is sensitive everywhere."""
    free_layers = insensitive_until(similarity_per_layer(task), threshold)
    return tuple(layer >= free_layers for layer in range(len(task.sensitive)))


def mask_by_kl(task: TaskProfile, allowance_nats: float) -> tuple[bool, ...]:
    """Return the mask that spends at most an allowance of divergence; without measurement, sensitive everywhere."""
    free_layers = insensitive_within(task.layer_kl_nats, allowance_nats)
    return tuple(layer not in free_layers for layer in range(len(task.sensitive)))


def similarity_per_layer(task: TaskProfile) -> tuple[float, ...]:
    """Return the curve layer by layer: entry j for random routing in layers 0..j, as far as it was measured.

    A layer between two depths takes the value of the deeper one, which errs towards calling it sensitive.
    """
    reach = task.depths[-1] if task.depths else 0
    place = [next(i for i, depth in enumerate(task.depths) if depth > layer) for layer in range(reach)]
    return tuple(task.similarities[i] for i in place)


def insensitive_until(similarities_per_layer: Sequence[float], threshold: float = DEFAULT_SIMILARITY_THRESHOLD) -> int:
    """Return how many leading MoE layers a task tolerates being routed at random.

    Parameters
    ----------
    similarities_per_layer : sequence of float, length = MoE layers
        Entry j is the output's similarity (0..1) to the undisturbed output when layers 0..j are routed at random.
    threshold : float
        Similarity that must be kept (the paper takes 0.85).

    Returns
    -------
    int
        Number of leading layers for which the similarity never falls below the threshold: layers ``0..n-1`` are
        insensitive. A later recovery is noise and does not count.

    Raises
    ------
    ProfileError
        When a similarity is not a finite number or the threshold lies outside 0..1.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ProfileError(f"similarity threshold {threshold} is outside 0..1; the usual value is 0.85.")
    for layer, value in enumerate(similarities_per_layer):
        if not math.isfinite(value):
            raise ProfileError(f"similarity of layer {layer} is {value}; measure the profile again.")
        if value < threshold:
            return layer
    return len(similarities_per_layer)


def insensitive_within(kl_nats_per_layer: Sequence[float], allowance_nats: float) -> frozenset[int]:
    """Return the layers that may be routed wrongly together: cheapest first, while their sum stays in the allowance.

    Parameters
    ----------
    kl_nats_per_layer : sequence of float
        Divergence (nats per token) when the layer alone is routed at random.
    allowance_nats : float
        Adding up takes layers for independent, which they are not quite: measure what a mask costs.
    """
    if not allowance_nats >= 0.0:
        raise ProfileError(f"an allowance of {allowance_nats} nats per token makes no sense; give zero or more.")
    chosen, spent = set(), 0.0
    for layer in sorted(range(len(kl_nats_per_layer)), key=lambda layer: kl_nats_per_layer[layer]):
        spent += max(0.0, kl_nats_per_layer[layer])
        if not spent <= allowance_nats:
            break
        chosen.add(layer)
    return frozenset(chosen)
