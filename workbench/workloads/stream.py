"""A stream of prompts: which request comes after which, decided by a seed.

Terms
-----
uniform
    Every request draws its task independently, all tasks equally likely (the mix of the paper's section 5).
sticky
    Requests come in sessions of one task. Session lengths are geometric with a given mean, and the next session has
    another task. This is the case in which yesterday's experts are a good guess for today's.
drift
    Sessions as in the sticky mix, of topics: with classification among the tasks, the embedded source also brings it in
    three more languages, under the same label. What a label's prompts used last week need not be what they use now.

A stream decides order only. When requests arrive is the business of an arrival process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from emoe_core.errors import OptionError
from emoe_core.planning.tasks import TASK_TYPES
from workbench.workloads.embedded import LANGUAGES
from workbench.workloads.fixture import load_fixture
from workbench.workloads.records import task_of
from workbench.workloads.split import SPLITS, stable_hash
from workbench.workloads.store import SOURCES, load_task

MIXES = ("uniform", "sticky", "drift")


@dataclass(frozen=True)
class StreamConfig:
    """What the stream is made of.

    Attributes
    ----------
    tasks : tuple of str
        Task types to mix.
    n_prompts : int
        Length of the stream.
    mix : {"uniform", "sticky", "drift"}
    session_length : float
        Mean number of requests in a session; not used by the uniform mix.
    seed : int
    split : str
        Split of the prepared tasks; the fixture has no splits.
    source : {"embedded", "fixture", "hub"}
    """

    tasks: tuple[str, ...] = TASK_TYPES
    n_prompts: int = 48
    mix: Literal["uniform", "sticky", "drift"] = "uniform"
    session_length: float = 8.0
    seed: int = 0
    split: str = "test"
    source: Literal["embedded", "fixture", "hub"] = "embedded"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise OptionError(f"tasks must name each task type once, not {self.tasks}.")
        if unknown := [task for task in self.tasks if task not in TASK_TYPES]:
            raise OptionError(f"unknown task {', '.join(map(repr, unknown))}; known are {', '.join(TASK_TYPES)}.")
        if self.n_prompts < 1:
            raise OptionError(f"n_prompts must be at least 1, not {self.n_prompts}.")
        if self.seed < 0:
            raise OptionError(f"seed must be zero or more, not {self.seed}.")
        if self.mix not in MIXES:
            raise OptionError(f"unknown mix {self.mix!r}; known are {', '.join(MIXES)}.")
        if not self.session_length >= 1:
            raise OptionError(f"session_length must be at least 1, not {self.session_length}.")
        if self.split not in SPLITS:
            raise OptionError(f"unknown split {self.split!r}; known are {', '.join(SPLITS)}.")
        if self.source not in (*SOURCES, "fixture"):
            raise OptionError(f"unknown source {self.source!r}; known are {', '.join((*SOURCES, 'fixture'))}.")


@dataclass(frozen=True)
class Prompt:
    """One request: its number in the stream, its task, the user's message, and what it is judged against."""

    request_id: int
    task: str
    text: str
    reference: str
    choices: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """What tells this prompt from others, whatever stream it is in: of its task and text."""
        return hashlib.sha256(json.dumps([self.task, self.text]).encode()).hexdigest()[:16]


def topics(config: StreamConfig) -> tuple[str, ...]:
    """Return what a stream's sessions are about: its tasks, and where it drifts those in other languages."""
    if config.mix != "drift" or config.source != "embedded":
        return config.tasks
    return (*config.tasks, *(topic for topic in LANGUAGES if task_of(topic) in config.tasks))


def topic_order(config: StreamConfig) -> list[str]:
    """Return the topic of every request of a stream; its task, unless the stream drifts.

    Returns
    -------
    list of str, length ``n_prompts``
    """
    generator = np.random.default_rng([config.seed, 0])
    names = topics(config)
    if config.mix == "uniform":
        return [names[i] for i in generator.integers(len(names), size=config.n_prompts)]
    order: list[str] = []
    current = int(generator.integers(len(names)))
    while len(order) < config.n_prompts:
        order += [names[current]] * int(generator.geometric(1.0 / config.session_length))
        if len(names) > 1:
            current = (current + int(generator.integers(1, len(names)))) % len(names)
    return order[: config.n_prompts]


def prompt_stream(config: StreamConfig) -> list[Prompt]:
    """Return the requests of a stream, the same for the same config.

    A task's items are used in a seeded order, each once before any is used again.

    Raises
    ------
    DataError
        When the source was not prepared.
    """
    decks = {topic: _Deck(_items(config, topic), config.seed, topic) for topic in topics(config)}
    stream = []
    for request_id, topic in enumerate(topic_order(config)):
        item = decks[topic].draw()
        choices = tuple(item["choices"])
        stream.append(Prompt(request_id, task_of(topic), item["prompt"], item["reference"], choices))
    return stream


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Return a SHA-256 over the tasks and texts of prompts, in order."""
    return hashlib.sha256(json.dumps([[prompt.task, prompt.text] for prompt in prompts]).encode()).hexdigest()


def _items(config: StreamConfig, task: str) -> list[dict[str, Any]]:
    if config.source == "fixture":
        return [item for item in load_fixture() if item["task"] == task]
    return list(load_task(task, config.split, config.source))


class _Deck:
    """Items dealt in a shuffled order, shuffled again when all were dealt."""

    def __init__(self, items: list[dict[str, Any]], seed: int, task: str) -> None:
        assert items, "every task has items"
        self._items = items
        generator = np.random.default_rng([seed, 1, stable_hash(task)])
        self._shuffle: Callable[[], list[int]] = lambda: [int(i) for i in generator.permutation(len(items))]
        self._left: list[int] = []

    def draw(self) -> dict[str, Any]:
        self._left = self._left or self._shuffle()
        return self._items[self._left.pop()]
