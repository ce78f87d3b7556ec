"""Recorded routing: recording it, predicting it, and replaying it through a cache of experts."""
