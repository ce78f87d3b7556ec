"""What a serving loop tells: finished requests, and its forward passes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A finished request; times of the loop's clock, in seconds.

    ``token_ids`` includes a closing stop token; ``stopped`` says whether that, or its own ``ends``, ended it.
    """

    number: int
    task: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    arrival_s: float
    admitted_s: float
    first_token_s: float
    finished_s: float
    stopped: bool


@dataclass(frozen=True)
class Pass:
    """A forward pass: of a prompt (its tokens) or a step (its rows), and its seconds, waiting for experts included."""

    is_prompt: bool
    size: int
    seconds: float
