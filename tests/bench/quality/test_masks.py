"""Promises of masks: which layers a measured profile lets a task skip."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_core.planning.tasks import ProfileError, TaskProfile
from workbench.quality.profile.masks import (
    insensitive_until,
    insensitive_within,
    mask_by_kl,
    mask_by_similarity,
    similarity_per_layer,
)

QA = TaskProfile(
    "qa",
    (True,) * 4,
    12.5,
    depths=(1, 2, 4),
    similarities=(0.99, 0.9, 0.4),
    layer_kl_nats=(0.01, 0.02, 0.3, 0.1),
)
CODE = TaskProfile("code", (True,) * 4, 80.0)


@given(st.lists(st.floats(0, 1), max_size=40), st.floats(0, 1))
def test_insensitive_layers_are_the_longest_prefix_over_the_threshold(curve, threshold):
    free_layers = insensitive_until(curve, threshold)
    assert all(value >= threshold for value in curve[:free_layers])
    assert free_layers == len(curve) or curve[free_layers] < threshold


def test_a_recovery_after_the_first_drop_does_not_count():
    assert insensitive_until([0.99, 0.9, 0.6, 0.95]) == 2


@pytest.mark.parametrize(("curve", "threshold"), [([0.9, math.nan], 0.85), ([math.inf], 0.85), ([0.9], 1.5)])
def test_an_unusable_curve_or_threshold_is_refused(curve, threshold):
    with pytest.raises(ProfileError):
        insensitive_until(curve, threshold)


def test_a_measured_curve_gives_its_mask():
    # Layer 2 lies between two depths and takes the deeper one's value.
    assert similarity_per_layer(QA) == (0.99, 0.9, 0.4, 0.4)
    assert mask_by_similarity(QA, 0.85) == (False, False, True, True)
    assert mask_by_similarity(CODE, 0.0) == (True,) * 4


def test_a_divergence_mask_takes_the_cheapest_layers_within_the_allowance():
    assert mask_by_kl(QA, 0.05) == (False, False, True, True)
    assert mask_by_kl(QA, 0.14) == (False, False, True, False)
    assert mask_by_kl(CODE, 10.0) == (True,) * 4
    with pytest.raises(ProfileError, match="zero or more"):
        mask_by_kl(QA, -1.0)


@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0, 3))
def test_the_allowance_is_never_overspent(divergences, allowance):
    chosen = insensitive_within(divergences, allowance)
    assert sum(divergences[layer] for layer in sorted(chosen)) <= allowance + 1e-9
