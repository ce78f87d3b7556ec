"""Experts on their way: the pack they are read from, the slots they rest in, who is evicted, who is pinned."""
