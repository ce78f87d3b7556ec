"""Serving checked for real: against its simulation, for throughput, and for hours."""
