"""Task types and task profiles: what was measured offline about each task on one model.

Terms
-----
task type
    What kind of request a prompt is: question answering, summarisation, classification, comparison, conversation or
    code. A prompt that no keyword speaks for has the type ``"unknown"`` (`classifier.py`).
sensitive
    A (task, layer) pair is sensitive when routing that layer's tokens wrongly changes the output (section 3.4 of the
    eMoE paper). Only sensitive pairs claim expert memory. An unknown task is sensitive in every layer.
task profile
    What was measured for one task: how similar the output stays when routing is random in the first j layers (the
    curve of Fig. 5), the divergence when routing is random in one layer alone, the mask ``s`` of Eq. 2 that follows,
    and how long outputs are (``W_o`` of Eq. 2).

This module defines the file format; `workbench.quality.profile` measures, and makes masks of what was measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ConfigDict

from emoe_core.errors import EmoeError
from emoe_core.files import read_object, typed, write_whole

TaskType = Literal["qa", "summarization", "classification", "comparison", "conversation", "code"]
TASK_TYPES: tuple[str, ...] = get_args(TaskType)
UNKNOWN = "unknown"
DEFAULT_SIMILARITY_THRESHOLD = 0.85
PROFILE_FORMAT = 3
# Format 2 has no `coverage` and `loss_scale`: it is read as a profile that did not measure them.
READABLE_FORMATS = (2, 3)
LENGTH_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_NUMBERS = re.compile(r"\[[\s\d.,eE+a-z\-\[\]]*\]")


class ProfileError(EmoeError):
    """A task profile is damaged, lacks a task or layer, or was measured on another model."""


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
        ``W_o`` of Eq. 2: mean number of generated tokens, at most ``length_cap_tokens``.
    length_quantiles_tokens : tuple of float, length 0 or as `LENGTH_QUANTILES`
        Quantiles of the number of generated tokens.
    length_cap_tokens : int
        Tokens after which generation was stopped; 0 when unknown.
    capped_share : float
        Share of outputs that reached the cap: where it is high, the mean is a lower bound.
    depths : tuple of int
        Numbers of leading layers that were routed at random, ascending.
    similarities : tuple of float, as long as ``depths``
        Mean similarity of the output at each depth.
    similarity_intervals : tuple of (low, high), length 0 or as ``depths``
        95% bootstrap interval over prompts; none where prompts were too few for one.
    layer_kl_nats : tuple of float, length 0 or MoE layers
        Divergence, nats per token, when one layer alone is routed at random.
    n_prompts, n_kl_prompts : int
        Prompts behind the lengths and similarities, and behind the divergences.
    coverage : tuple of tuple of float, length 0 or MoE layers
        Per layer, for 0..E slots: share of routed choices that the task's most frequent experts cover on prompts they
        were not counted on.
    loss_scale : float or None
        Measured loss over the loss that divergences and coverage add up to (`quality_target.py`); None: not measured.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    task: str
    sensitive: tuple[bool, ...]
    expected_output_tokens: float
    length_quantiles_tokens: tuple[float, ...] = ()
    length_cap_tokens: int = 0
    capped_share: float = 0.0
    depths: tuple[int, ...] = ()
    similarities: tuple[float, ...] = ()
    similarity_intervals: tuple[tuple[float, float], ...] = ()
    layer_kl_nats: tuple[float, ...] = ()
    n_prompts: int = 0
    n_kl_prompts: int = 0
    coverage: tuple[tuple[float, ...], ...] = ()
    loss_scale: float | None = None

    def __post_init__(self) -> None:
        layers = len(self.sensitive)
        if self.task not in TASK_TYPES:
            raise ProfileError(f"unknown task type {self.task!r}; known are {', '.join(TASK_TYPES)}.")
        if not layers:
            raise ProfileError(f"the profile of task {self.task!r} names no layer; measure the profile again.")
        if not (math.isfinite(self.expected_output_tokens) and self.expected_output_tokens >= 0):
            raise ProfileError(
                f"task {self.task!r} expects {self.expected_output_tokens} output tokens; it must be zero or more."
            )
        in_order = all(0 < a < b for a, b in zip((0.5, *self.depths), self.depths, strict=False))
        fits = (
            len(self.similarities) == len(self.depths)
            and len(self.similarity_intervals) in (0, len(self.depths))
            and len(self.layer_kl_nats) in (0, layers)
            and len(self.coverage) in (0, layers)
            and all(row and all(0.0 <= share <= 1.0 for share in row) for row in self.coverage)
            and (self.loss_scale is None or (math.isfinite(self.loss_scale) and self.loss_scale >= 0))
            and len(self.length_quantiles_tokens) in (0, len(LENGTH_QUANTILES))
            and in_order
            and (not self.depths or self.depths[-1] <= layers)
        )
        if not fits:
            raise ProfileError(
                f"the curves of task {self.task!r} do not fit {layers} layers; measure the profile again."
            )


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
    settings : mapping
        How it was measured: dtype, seed, source and lengths; numbers and texts only.
    extra : mapping
        Room for further measurements under names of their own; kept as it is.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model_hash: str
    data_hash: str
    n_layers: int
    tasks: Mapping[str, TaskProfile] = field(default_factory=dict)
    threshold: float = DEFAULT_SIMILARITY_THRESHOLD
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

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

    def without_masks(self) -> Profile:
        """Return the same profile with every (task, layer) sensitive: for use where something else decides."""
        every = (True,) * self.n_layers
        return replace(self, tasks={name: replace(task, sensitive=every) for name, task in self.tasks.items()})

    def require_model(self, model_hash: str) -> None:
        """Raise `ProfileError` when the profile was measured on another model."""
        if model_hash != self.model_hash:
            raise ProfileError(
                f"the task profile was measured on model {self.model_hash[:12]}, this model is {model_hash[:12]}. "
                f"Measure one for this model, or run without a profile."
            )

    def save(self, path: str | Path) -> Path:
        """Write the profile as JSON, atomically, and return its path."""
        return write_whole(path, _as_json({"format": PROFILE_FORMAT, **asdict(self)}) + "\n")

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
            content = read_object(
                source,
                READABLE_FORMATS,
                ProfileError,
                "profile",
                "a task profile",
                "measure it again with `emoe model profile`",
            )
        except FileNotFoundError:
            raise ProfileError(f"there is no task profile at {source}; measure one or give another path.") from None
        try:
            if "tasks" not in content:
                raise ValueError("tasks: Field required")
            profile = typed(cls, content)
        except ValueError as error:
            raise ProfileError(f"{source} is not a complete task profile ({error}); measure it again.") from error
        if model_hash is not None:
            profile.require_model(model_hash)
        return profile


def _as_json(content: Mapping[str, Any]) -> str:
    """Return indented JSON with a list of numbers or truth values on one line, so that a person can read a curve."""
    text = json.dumps(content, indent=1, sort_keys=True)
    return _NUMBERS.sub(lambda found: " ".join(found.group().split()), text)
