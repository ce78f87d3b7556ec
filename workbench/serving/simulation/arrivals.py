"""When requests arrive, of which task, and how long they are.

Terms
-----
poisson
    Arrivals that do not know of each other: exponential gaps.
gamma
    Bursts: gaps from a gamma distribution with a given coefficient of variation (CV); 1 is Poisson, more is burstier.

Lengths are drawn from the samples of each task (`TaskLoad`). Everything follows from the seed; tasks and lengths do not
change with the rate, so that two rates serve the same requests. Recorded traffic is `request_traces`' matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from emoe_core.errors import OptionError
from emoe_core.scheduler.costs import TaskLoad

PROCESSES = ("poisson", "gamma")


@dataclass(frozen=True)
class Arrival:
    """One request to come; its output length is the workload's secret, and an oracle's."""

    number: int
    task: str
    arrival_s: float
    input_tokens: int
    output_tokens: int


def draw_arrivals(
    loads: Mapping[str, TaskLoad], count: int, rate_per_s: float, *, burstiness: float = 1.0, seed: int = 0
) -> list[Arrival]:
    """Return requests of a uniform task mix in order of arrival.

    Parameters
    ----------
    loads : mapping of str to TaskLoad
        The tasks, in whose order the seed chooses.
    count : int
    rate_per_s : float
        Mean requests per second.
    burstiness : float
        CV of the gaps: 1 is Poisson.
    seed : int

    Raises
    ------
    OptionError
        No task, or a count, rate or burstiness that is not positive.
    """
    if not loads or count < 1 or not rate_per_s > 0 or not burstiness > 0:
        raise OptionError("arrivals need at least one task and one request, and a rate and burstiness above 0")
    names = sorted(loads)
    tasks = np.random.default_rng([seed, 0]).integers(len(names), size=count)
    lengths = np.random.default_rng([seed, 1])
    shape = 1.0 / burstiness**2
    gaps = np.random.default_rng([seed, 2]).gamma(shape, 1.0 / (shape * rate_per_s), size=count)
    arrivals = []
    for number, (task, moment) in enumerate(zip(tasks, np.cumsum(gaps), strict=True)):
        load = loads[names[task]]
        entered = int(lengths.choice(load.input_tokens))
        given = int(lengths.choice(load.output_tokens))
        arrivals.append(Arrival(number, names[task], float(moment), entered, given))
    return arrivals


def at_rate(arrivals: Sequence[Arrival], rate_per_s: float) -> list[Arrival]:
    """Return the same requests with time stretched to a mean rate; bursts keep their shape.

    Raises
    ------
    OptionError
        When the rate is not positive, or the arrivals span no time.
    """
    if not rate_per_s > 0:
        raise OptionError(f"a rate of {rate_per_s} requests a second makes no sense; give more than 0")
    span = arrivals[-1].arrival_s - arrivals[0].arrival_s if arrivals else 0.0
    if not span > 0:
        raise OptionError("arrivals at one moment have no rate to change: give two or more that are apart")
    scale = (len(arrivals) - 1) / span / rate_per_s
    first = arrivals[0].arrival_s
    return [replace(arrival, arrival_s=(arrival.arrival_s - first) * scale) for arrival in arrivals]
