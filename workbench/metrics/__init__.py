"""Metrics of runs: the catalogue of their names, units and directions, and how values are shown."""
