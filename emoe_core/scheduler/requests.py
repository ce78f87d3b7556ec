"""Requests as a scheduler sees them: what waits, what runs, and how much may run at once.

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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from emoe_core.errors import EmoeError, OptionError

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


@dataclass(eq=False, slots=True)
class ServiceRequest:
    """One request, waiting or running.

    Attributes
    ----------
    number : int
        Name of the request; unique.
    task : str
    arrival_s : float
    input_tokens : int
    output_limit_tokens : int
        Tokens that it may put out at most.
    expected_output_tokens : float
        What is expected at the start: the task's profiled mean, or the truth where an oracle tells.
    objective : Objective
    generated : int
        Tokens put out so far.
    first_token_s : float or None
        When the first came.
    place : int
        Place in the order of arrival; the queue sets it.
    due_s : float
        When the first token is due.
    """

    number: int
    task: str
    arrival_s: float
    input_tokens: int
    output_limit_tokens: int
    expected_output_tokens: float
    objective: Objective
    generated: int = 0
    first_token_s: float | None = None
    place: int = -1
    due_s: float = field(init=False)

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_limit_tokens < 1 or not self.expected_output_tokens > 0:
            raise OptionError(f"request {self.number} needs at least one input token and one output token")
        self.due_s = self.arrival_s + self.objective.ttft_s

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

    def require_fit(self, request: ServiceRequest) -> None:
        """Raise `RequestTooLargeError` when the request would not even fit alone."""
        if request.reserved_tokens > self.max_tokens:
            raise RequestTooLargeError(
                f"request {request.number} may need {request.reserved_tokens:,} tokens of KV cache, the limit is "
                f"{self.max_tokens:,}: allow it fewer output tokens, shorten its prompt, or raise the KV limit"
            )


class WaitingQueue:
    """Waiting requests in order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[int, ServiceRequest] = {}
        self._entered = 0
        self.left = 0

    def add(self, request: ServiceRequest) -> None:
        """Put a request at the end."""
        assert request.number not in self._waiting, request
        request.place = self._entered
        self._entered += 1
        self._waiting[request.number] = request

    def take(self, requests: Iterable[ServiceRequest]) -> None:
        """Remove requests that were admitted, or whose clients went away."""
        for request in requests:
            del self._waiting[request.number]
            self.left += 1

    def bypassed(self, oldest: ServiceRequest, left: int) -> int:
        """Return how often the oldest waiting request was bypassed, once ``left`` requests have left the queue.

        All before it have left; any more that left came after it. No other can have been bypassed more often.
        """
        return left - oldest.place

    def __iter__(self) -> Iterator[ServiceRequest]:
        return iter(self._waiting.values())

    def __len__(self) -> int:
        return len(self._waiting)
