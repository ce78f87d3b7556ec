"""Requests that run together on one engine: admission by a scheduler, the shared batch, the choice of tokens."""
