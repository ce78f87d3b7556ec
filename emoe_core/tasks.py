"""Task types, the keyword classifier, and task profiles.

Terms
-----
task type
    What kind of request a prompt is: question answering, summarisation, classification, comparison, conversation or
    code. A prompt that no keyword speaks for has the type ``"unknown"``.
sensitive
    A (task, layer) pair is sensitive when routing that layer's tokens wrongly changes the output (section 3.4 of the
    eMoE paper). Only sensitive pairs claim expert memory. An unknown task is sensitive in every layer.
task profile
    What was measured offline for one task: the similarity of the output when routing is random from the first layer
    up to layer j, the mask that follows from it, and the output length to expect (``W_o`` of Eq. 2).

The classifier follows section 3.2 of the paper: a list of keywords per task, most matches wins. It runs on the CPU in
microseconds and reads the text only. This module does not measure profiles; it defines their file format.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from emoe_core.errors import EmoeError
from emoe_core.task_keywords import KEYWORDS

TaskType = Literal["qa", "summarization", "classification", "comparison", "conversation", "code"]
TASK_TYPES: tuple[str, ...] = get_args(TaskType)
UNKNOWN = "unknown"
DEFAULT_SIMILARITY_THRESHOLD = 0.85
PROFILE_FORMAT = 1


class ProfileError(EmoeError):
    """A task profile is damaged, lacks a task or layer, or was measured on another model."""


def _compile(keyword: str) -> re.Pattern[str]:
    whole = keyword.endswith("$")
    text = keyword.removesuffix("$")
    start = r"\b" if text[0].isalnum() else ""
    return re.compile(start + re.escape(text) + (r"\b" if whole else ""), re.IGNORECASE)


_PATTERNS = {task: tuple(_compile(word) for word in words) for task, words in KEYWORDS.items()}


def keyword_matches(text: str) -> dict[str, int]:
    """Return, per task type, how many of its keywords occur in the text at least once.

    A keyword counts once however often it occurs, so that a long article about a "question" stays an article.
    """
    return {task: sum(1 for pattern in found if pattern.search(text)) for task, found in _PATTERNS.items()}


def classify(text: str) -> str:
    """Return the task type whose keywords match the text most, or ``"unknown"``.

    Parameters
    ----------
    text : str
        The user's message, before any chat template.

    Returns
    -------
    str
        One of `TASK_TYPES`; ``"unknown"`` when nothing matches or two tasks share the highest count, because a wrong
        type may skip layers that matter whereas an unknown one never does.
    """
    counts = keyword_matches(text)
    most = max(counts.values())
    winners = [task for task, count in counts.items() if count == most]
    return winners[0] if most > 0 and len(winners) == 1 else UNKNOWN


def insensitive_until(similarities_per_layer: Sequence[float], threshold: float = DEFAULT_SIMILARITY_THRESHOLD) -> int:
    """Return how many leading MoE layers a task tolerates being routed at random.

    Parameters
    ----------
    similarities_per_layer : sequence of float, length = MoE layers
        Entry j is the output's similarity (0..1) to the undisturbed output when layers 0..j are routed at random.
    threshold : float
        Similarity that must be kept (the paper takes 0.85).

    Returns
    -------
    int
        Number of leading layers for which the similarity never falls below the threshold: layers ``0..n-1`` are
        insensitive. A later recovery is noise and does not count.

    Raises
    ------
    ProfileError
        When a similarity is not a finite number or the threshold lies outside 0..1.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ProfileError(f"similarity threshold {threshold} is outside 0..1; the usual value is 0.85.")
    for layer, value in enumerate(similarities_per_layer):
        if not math.isfinite(value):
            raise ProfileError(f"similarity of layer {layer} is {value}; measure the profile again.")
        if value < threshold:
            return layer
    return len(similarities_per_layer)


@dataclass(frozen=True)
class TaskProfile:
    """What is known about one task on one model.

    Attributes
    ----------
    task : str
        Task type.
    sensitive : tuple of bool, length = MoE layers
        ``s`` of Eq. 2: whether the layer's experts must be the right ones for this task.
    expected_output_tokens : float
        ``W_o`` of Eq. 2: mean number of generated tokens.
    similarities : tuple of float, length 0 or MoE layers
        The measured curve behind ``sensitive``: entry j for random routing in layers 0..j.
    n_prompts : int
        Number of prompts measured.
    """

    task: str
    sensitive: tuple[bool, ...]
    expected_output_tokens: float
    similarities: tuple[float, ...] = ()
    n_prompts: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASK_TYPES:
            raise ProfileError(f"unknown task type {self.task!r}; known are {', '.join(TASK_TYPES)}.")
        if not self.sensitive:
            raise ProfileError(f"the profile of task {self.task!r} names no layer; measure the profile again.")
        if not (math.isfinite(self.expected_output_tokens) and self.expected_output_tokens >= 0):
            raise ProfileError(
                f"task {self.task!r} expects {self.expected_output_tokens} output tokens; it must be zero or more."
            )
        if self.similarities and len(self.similarities) != len(self.sensitive):
            raise ProfileError(
                f"the profile of task {self.task!r} has {len(self.similarities)} similarities for "
                f"{len(self.sensitive)} layers; measure the profile again."
            )

    @classmethod
    def from_similarities(
        cls,
        task: str,
        similarities: Sequence[float],
        expected_output_tokens: float,
        threshold: float = DEFAULT_SIMILARITY_THRESHOLD,
        n_prompts: int = 0,
    ) -> TaskProfile:
        """Build a profile from a measured curve: layers before `insensitive_until` are insensitive."""
        free_layers = insensitive_until(similarities, threshold)
        mask = tuple(layer >= free_layers for layer in range(len(similarities)))
        return cls(task, mask, expected_output_tokens, tuple(float(s) for s in similarities), n_prompts)


@dataclass(frozen=True)
class Profile:
    """The task profiles of one model, with the model and the data they were measured on.

    Attributes
    ----------
    model_hash, data_hash : str
        Content hashes of the checkpoint and of the prompts used.
    n_layers : int
        Number of MoE layers; every task profile has as many entries.
    tasks : mapping of str to TaskProfile
    threshold : float
        Similarity threshold behind the masks.
    """

    model_hash: str
    data_hash: str
    n_layers: int
    tasks: Mapping[str, TaskProfile] = field(default_factory=dict)
    threshold: float = DEFAULT_SIMILARITY_THRESHOLD

    def __post_init__(self) -> None:
        for name, task in self.tasks.items():
            if task.task != name:
                raise ProfileError(f"profile entry {name!r} holds the profile of task {task.task!r}.")
            if len(task.sensitive) != self.n_layers:
                raise ProfileError(
                    f"the profile of task {name!r} covers {len(task.sensitive)} layers, the model has "
                    f"{self.n_layers}; measure the profile on this model."
                )

    def sensitive(self, task: str, layer: int) -> bool:
        """Return whether a (task, layer) pair must get its own experts.

        A task that is unknown or was not profiled is sensitive everywhere: skipping needs evidence.
        """
        if not 0 <= layer < self.n_layers:
            raise ProfileError(f"layer {layer} is outside the profile's {self.n_layers} MoE layers.")
        profile = self.tasks.get(task)
        return True if profile is None else profile.sensitive[layer]

    def expected_output_tokens(self, task: str, default: float) -> float:
        """Return ``W_o`` of a task, or the given default for a task without a profile."""
        profile = self.tasks.get(task)
        return default if profile is None else profile.expected_output_tokens

    def require_model(self, model_hash: str) -> None:
        """Raise `ProfileError` when the profile was measured on another model."""
        if model_hash != self.model_hash:
            raise ProfileError(
                f"the task profile was measured on model {self.model_hash[:12]}, this model is {model_hash[:12]}. "
                f"Measure one for this model, or run without a profile."
            )

    def save(self, path: str | Path) -> Path:
        """Write the profile as JSON, atomically, and return its path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": PROFILE_FORMAT, **asdict(self)}
        handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(content, stream, indent=1, sort_keys=True)
            Path(scratch).replace(target)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
        return target

    @classmethod
    def load(cls, path: str | Path, model_hash: str | None = None) -> Profile:
        """Read a profile, and check that it belongs to the model when a hash is given.

        Raises
        ------
        ProfileError
            When the file is missing, is not a profile of this format, or belongs to another model.
        """
        source = Path(path)
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ProfileError(f"there is no task profile at {source}; measure one or give another path.") from None
        except (OSError, ValueError) as error:
            raise ProfileError(f"{source} cannot be read as a task profile ({error}); measure it again.") from error
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != PROFILE_FORMAT:
            raise ProfileError(
                f"{source} has profile format {found}, this version reads {PROFILE_FORMAT}; measure it again."
            )
        try:
            tasks = {
                name: TaskProfile(
                    entry["task"],
                    tuple(bool(value) for value in entry["sensitive"]),
                    float(entry["expected_output_tokens"]),
                    tuple(float(value) for value in entry["similarities"]),
                    int(entry["n_prompts"]),
                )
                for name, entry in content.pop("tasks").items()
            }
            profile = cls(tasks=tasks, **content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(f"{source} is not a complete task profile ({error!r}); measure it again.") from error
        if model_hash is not None:
            profile.require_model(model_hash)
        return profile
