"""Serving checked for real: against its simulation, and for throughput."""
