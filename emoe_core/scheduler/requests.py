"""Requests, from arrival to answer: what waits, what runs, and how much may run at once.

Terms
-----
due
    When the first token must have come to meet the objective: arrival plus the TTFT that was promised.
remaining
    Output tokens still expected of a request, ``G`` of Eq. 3. How many will really come is nobody's to know here.
bypassed
    A waiting request is bypassed when one that came after it is admitted before it.
reserved
    Tokens of KV cache that a request may come to need: its input and the most it may put out. They are taken for the
    whole run, so nothing running ever has to give way.

Time comes from outside, in seconds on any clock that does not run backwards: a simulation's or the machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from emoe_core.errors import EmoeError, OptionError

if TYPE_CHECKING:
    import torch

RESET_SHARE = 0.05


class RequestTooLargeError(EmoeError):
    """A request could never run under the batch's limits."""


@dataclass(frozen=True)
class Objective:
    """What is promised: seconds to the first token (TTFT), and mean seconds for each further one (TPOT)."""

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.tpot_s > 0):
            raise OptionError("objectives for TTFT and TPOT must be more than 0 seconds; infinity promises nothing")


NO_PROMISE = Objective(float("inf"), float("inf"))


class Sampler(Protocol):
    """What is asked of a sampler: the tokens of one request, in order."""

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token id, given its logits [vocabulary]."""


@dataclass(eq=False, slots=True)
class Request:
    """One prompt on its way: asked for, waiting, admitted, running, done.

    Queue, scheduler, batch and control loop pass the same object along, and each fills in what it decides. A simulation
    has requests without tokens; an anonymous one, of a model that is called directly, has task and length only.

    Attributes
    ----------
    task : str
    input_tokens : int
        W_j of Eq. 2.
    number : int
        Its name where it was asked for; unique there.
    arrival_s : float
    output_limit_tokens : int
        Tokens that it may put out at most.
    expected_output_tokens : float
        What is expected at the start: the task's profiled mean, or the truth where an oracle tells.
    objective : Objective
    tolerance : float or None
        Its own miss tolerance, for every layer; None where the engine's holds (`planning/tolerance.py`).
    prompt_ids : sequence of int
    sampler : Sampler or None
        Chooses its tokens; its state moves on with each one.
    stop_tokens : collection of int
        Token ids that end the answer.
    ends : callable or None
        Told each token that is not one of these; returns whether the answer ends with it.
    place : int
        Place in the order of arrival; the queue sets it.
    due_s : float
        When the first token is due.
    engine_number : int
        Its name in passes, traces and timelines, in order of admission; the control loop sets it.
    counts : np.ndarray
        Tokens that wanted each expert so far, [layers, experts]; there from its admission on.
    admitted_s, first_token_s : float or None
        When it was admitted, and when its first token came.
    generated : int
        Tokens put out so far.
    tokens : list of int
        These tokens.
    sequence : torch.Tensor or None
        Prompt and tokens as the model takes them, int64 [1, length], as far as it was asked for; the batch's.
    stopped : bool
        Whether a stop token, or ``ends``, ended it.
    """

    task: str
    input_tokens: int
    number: int = -1
    arrival_s: float = 0.0
    output_limit_tokens: int = 1
    expected_output_tokens: float = 1.0
    objective: Objective = NO_PROMISE
    tolerance: float | None = None
    prompt_ids: Sequence[int] = field(default=(), repr=False)
    sampler: Sampler | None = None
    stop_tokens: Collection[int] = ()
    ends: Callable[[int], bool] | None = None
    place: int = field(default=-1, init=False)
    due_s: float = field(init=False)
    engine_number: int = field(default=-1, init=False)
    counts: np.ndarray = field(init=False, repr=False)
    admitted_s: float | None = field(default=None, init=False)
    first_token_s: float | None = field(default=None, init=False)
    generated: int = field(default=0, init=False)
    tokens: list[int] = field(default_factory=list, init=False, repr=False)
    sequence: torch.Tensor | None = field(default=None, init=False, repr=False)
    stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.due_s = self.arrival_s + self.objective.ttft_s

    def put_out(self, token: int) -> None:
        """Add a token to the answer."""
        self.tokens.append(token)
        self.generated += 1

    @property
    def reserved_tokens(self) -> int:
        """Tokens of KV cache that the request may come to need."""
        return self.input_tokens + self.output_limit_tokens

    @property
    def remaining_tokens(self) -> float:
        """``G`` of Eq. 3: counts down from the expectation; once used up, starts again at 5% of it (at least 1)."""
        left = self.expected_output_tokens - self.generated
        if left > 0:
            return left
        again = max(1.0, RESET_SHARE * self.expected_output_tokens)
        return again - (-left % again)


@dataclass(frozen=True)
class BatchLimits:
    """How much may run at once: ``max_requests`` sequences, ``max_tokens`` reserved tokens (T_max, the KV cache)."""

    max_requests: int
    max_tokens: int

    def __post_init__(self) -> None:
        if self.max_requests < 1 or self.max_tokens < 2:
            raise OptionError("a batch must hold at least 1 request and 2 tokens")

    def require_fit(self, request: Request) -> None:
        """Raise `OptionError` when nothing is asked for, `RequestTooLargeError` when it would not even fit alone."""
        asked = request.input_tokens >= 1 and request.output_limit_tokens >= 1 and request.expected_output_tokens > 0
        if not asked:
            raise OptionError(f"request {request.number} needs at least one input token and one output token")
        if request.reserved_tokens > self.max_tokens:
            raise RequestTooLargeError(
                f"request {request.number} may need {request.reserved_tokens:,} tokens of KV cache, the limit is "
                f"{self.max_tokens:,}: allow it fewer output tokens, shorten its prompt, or raise the KV limit"
            )


class WaitingQueue:
    """Waiting requests in order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[int, Request] = {}
        self._entered = 0
        self.left = 0

    def add(self, request: Request) -> None:
        """Put a request at the end."""
        assert request.number not in self._waiting, request
        request.place = self._entered
        self._entered += 1
        self._waiting[request.number] = request

    def take(self, requests: Iterable[Request]) -> None:
        """Remove requests that were admitted, or whose clients went away."""
        for request in requests:
            del self._waiting[request.number]
            self.left += 1

    def bypassed(self, oldest: Request, left: int) -> int:
        """Return how often the oldest waiting request was bypassed, once ``left`` requests have left the queue.

        All before it have left; any more that left came after it. No other can have been bypassed more often.
        """
        return left - oldest.place

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting.values())

    def __len__(self) -> int:
        return len(self._waiting)
