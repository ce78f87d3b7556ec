"""The carved kind: the dense parent's own feed-forward cut into a shared expert and many small routed ones."""
