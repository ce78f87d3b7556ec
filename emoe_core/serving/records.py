"""What a serving loop tells: finished requests, and its forward passes."""

from __future__ import annotations

from dataclasses import dataclass

from emoe_core.scheduler.requests import Request


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


def answer_of(request: Request, now_s: float) -> Answer:
    """Return the answer of a request that is done by now; with one token it was done when that came."""
    assert request.admitted_s is not None and request.first_token_s is not None
    return Answer(
        request.number,
        request.task,
        tuple(request.tokens),
        request.input_tokens,
        request.arrival_s,
        request.admitted_s,
        request.first_token_s,
        now_s if request.generated > 1 else request.first_token_s,
        request.stopped,
    )


@dataclass(frozen=True)
class Pass:
    """A forward pass: of a prompt (its tokens) or a step (its rows), and its seconds, waiting for experts included."""

    is_prompt: bool
    size: int
    seconds: float
