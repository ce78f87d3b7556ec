"""Profiles of tasks: how sensitive each is to its routing, layer by layer."""
