"""The native kind: a small mixture trained from scratch, routers and all, that descends from no dense model."""
