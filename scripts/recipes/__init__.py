"""Computes and measures the recipes of the models that come along; `workbench.models.reference` only applies them."""
