"""Hours of arrivals, compressed, against a real server process; what must not happen is counted.

* Nobody is lost or answered twice: every request gets one answer of its own, and the server's own count agrees.
* Memory does not grow: slope of the server's resident memory over time, its 95% interval, the first part left out.
* Answers are those of offline generation: tolerance 0, same seed, one at a time. Rows of a batch agree within rounding
  only, so with a batch above 1 an answer may leave the offline one where two tokens are all but equally likely; such
  answers are counted, and those that leave it anywhere else are wrong.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil
from scipy import stats

from emoe_core.errors import EmoeError, OptionError
from emoe_core.serving.sampling import Sampling

Progress = Callable[[str, int, int], None]
SETTLING_SHARE = 0.3
SAMPLES_S = 0.5
BLOCKS = 10
ENDING_S = 60.0


class SoakError(EmoeError):
    """The server of a soak did not start."""


@dataclass(frozen=True)
class SoakConfig:
    """What is sent.

    Attributes
    ----------
    model : str
        A checkpoint directory.
    budget : str
    simulated_s : float
        Length of the arrivals.
    compression : float
        How many times faster they are sent.
    rate_per_s : float
        Arrivals in a simulated second.
    distinct : int
        Different requests, sent in turn; every second one is drawn with a seed of its own.
    max_batch, max_output_tokens, seed : int
    """

    model: str
    budget: str = "60%"
    simulated_s: float = 3600.0
    compression: float = 6.0
    rate_per_s: float = 0.5
    distinct: int = 48
    max_batch: int = 4
    max_output_tokens: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("simulated_s", "compression", "rate_per_s"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} is {getattr(self, name)}: give more than 0")
        if min(self.distinct, self.max_batch, self.max_output_tokens) < 1:
            raise OptionError("distinct, max_batch and max_output_tokens must be 1 or more")


@dataclass(frozen=True)
class Question:
    """One of the distinct requests."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling | None

    def body(self, model: str) -> dict[str, Any]:
        """Return it for /v1/completions."""
        drawn = self.sampling
        more = {} if drawn is None else {"temperature": drawn.temperature, "top_p": drawn.top_p, "seed": drawn.seed}
        return {"model": model, "prompt": list(self.prompt_ids), "max_tokens": self.max_tokens} | more


@dataclass(frozen=True)
class Reply:
    """What came of one request; ``text`` is None where it failed."""

    question: int
    status: int
    name: str
    text: str | None


@dataclass(frozen=True)
class Soaked:
    """A finished soak; ``memory`` holds (seconds since the start, resident bytes)."""

    sent: int
    replies: tuple[Reply, ...]
    finished_by_server: int
    memory: tuple[tuple[float, int], ...]

    @property
    def failed(self) -> int:
        """Requests without an answer."""
        return sum(reply.text is None for reply in self.replies)

    @property
    def lost(self) -> int:
        """Requests that nothing came of."""
        return self.sent - len(self.replies)

    @property
    def doubled(self) -> int:
        """Answers whose name was given before."""
        names = [reply.name for reply in self.replies if reply.text is not None]
        return len(names) - len(set(names))


def questions(vocabulary: int, config: SoakConfig) -> list[Question]:
    """Return the distinct requests: random tokens, 4 to 40 of them."""
    generator = np.random.default_rng([config.seed, 0])
    made = []
    for place in range(config.distinct):
        ids = generator.integers(vocabulary, size=int(generator.integers(4, 41)))
        tokens = int(generator.integers(1, config.max_output_tokens + 1))
        sampling = Sampling(1.0, 0.9, place) if place % 2 else None
        made.append(Question(tuple(int(token) for token in ids), tokens, sampling))
    return made


def soak(config: SoakConfig, asked: Sequence[Question], progress: Progress | None = None) -> Soaked:
    """Start a server, send everything, end it.

    Raises
    ------
    SoakError
        When the server does not start.
    """
    command = [sys.executable, "-m", "workbench.cli", "serve", config.model, "--port", "0", "--budget", config.budget]
    command += ["--name", "soaked", "--max-batch", str(config.max_batch), "--max-waiting", "100000"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if "Serving" in line:
                break
        else:
            raise SoakError(f"the server did not start: {''.join(said)[-800:]}")
        url = line.split(" at ")[1].strip().removesuffix("/v1")
        # A pipe that nobody reads would fill.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        return asyncio.run(_send(config, asked, url, psutil.Process(server.pid), progress))
    finally:
        server.terminate()
        try:
            server.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


async def _send(
    config: SoakConfig,
    asked: Sequence[Question],
    url: str,
    process: psutil.Process,
    progress: Progress | None,
) -> Soaked:
    count = max(1, round(config.simulated_s * config.rate_per_s))
    gaps = np.random.default_rng([config.seed, 1]).exponential(1 / (config.rate_per_s * config.compression), count)
    started = time.perf_counter()
    memory: list[tuple[float, int]] = []
    replies: list[Reply] = []

    async def watch() -> None:
        while True:
            memory.append((time.perf_counter() - started, process.memory_info().rss))
            await asyncio.sleep(SAMPLES_S)

    async def ask(client: httpx.AsyncClient, place: int) -> None:
        body = asked[place % len(asked)].body("soaked")
        answer = await client.post(f"{url}/v1/completions", json=body)
        content = answer.json()
        good = answer.status_code == 200
        text = content["choices"][0]["text"] if good else None
        replies.append(Reply(place % len(asked), answer.status_code, content.get("id", ""), text))
        if progress is not None:
            progress("answers", len(replies), count)

    watching = asyncio.ensure_future(watch())
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        under_way = []
        for place, moment in enumerate(np.cumsum(gaps)):
            await asyncio.sleep(max(0.0, started + float(moment) - time.perf_counter()))
            under_way.append(asyncio.ensure_future(ask(client, place)))
        await asyncio.gather(*under_way, return_exceptions=True)
        counted = (await client.get(f"{url}/metrics")).text
    watching.cancel()
    finished = [line for line in counted.splitlines() if line.startswith('emoe_requests_total{result="finished"}')]
    return Soaked(count, tuple(replies), round(float(finished[0].split()[-1])) if finished else 0, tuple(memory))


def memory_slope(memory: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return the slope of memory and half its 95% interval, bytes per second.

    Samples of the first part, in which caches fill, are left out; the others are averaged in blocks, since samples that
    follow each other are not independent, and a line is put through the blocks (Student's t).
    """
    moments, bytes_held = np.array(memory, dtype=float).T
    kept = moments >= moments[0] + SETTLING_SHARE * (moments[-1] - moments[0])
    blocks = [part for part in np.array_split(np.arange(kept.sum()), BLOCKS) if len(part)]
    if len(blocks) < 3:
        return float("nan"), float("nan")
    x = np.array([moments[kept][part].mean() for part in blocks])
    y = np.array([bytes_held[kept][part].mean() for part in blocks])
    line = stats.linregress(x, y)
    return float(line.slope), float(line.stderr * stats.t.ppf(0.975, len(blocks) - 2))
