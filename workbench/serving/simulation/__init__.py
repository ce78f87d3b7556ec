"""Simulated serving: arrivals, engines and clusters on a simulated clock."""
