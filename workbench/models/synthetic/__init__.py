"""Checkpoints of published shapes with random weights: real sizes for measuring speed, no language in them."""
