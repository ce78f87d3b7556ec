"""Recorded routing that predictors are trained and judged on, from the all-resident reference outputs (cached).

A recording has a *warm-up* (a uniform mix of the profile split: what a predictor may have seen before) and test
streams, one a task order; the same stream told without task types is called ``ORDER-unlabelled``. The small fixture has
no splits: there warm-up and test share prompts, and figures mean nothing beyond that the code ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from emoe_core.checkpoint.index import CheckpointIndex, open_checkpoint
from emoe_core.config import resolve_device
from emoe_core.errors import OptionError
from emoe_core.experts.trace import RoutingTrace
from emoe_core.planning.tasks import TASK_TYPES, UNKNOWN
from workbench.models.names import resolve_model
from workbench.replay.prediction import PromptUse, prompt_uses
from workbench.replay.references import Reference, reference_outputs
from workbench.workloads import Prompt, StreamConfig, prompt_stream, prompts_hash

UNLABELLED = "-unlabelled"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RecordingConfig:
    """What to record. See `StreamConfig` for the fields it shares; ``unlabelled`` are orders of ``mixes``."""

    model: str = "reference"
    warm_prompts: int = 240
    n_prompts: int = 120
    mixes: tuple[str, ...] = ("sticky", "uniform")
    unlabelled: tuple[str, ...] = ()
    tasks: tuple[str, ...] = TASK_TYPES
    session_length: float = 8.0
    source: str = "embedded"
    split: str = "test"
    max_new_tokens: int = 24
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warm_prompts < 0 or self.n_prompts < 0 or self.max_new_tokens < 1:
            raise OptionError("warm_prompts and n_prompts must be 0 or more, max_new_tokens 1 or more")
        for mix in self.mixes if self.n_prompts else ():
            self.stream(mix)
        if unrecorded := set(self.unlabelled) - set(self.mixes):
            what = ", ".join(sorted(unrecorded))
            raise OptionError(f"only orders among the mixes can be unlabelled, not {what}: add it to the mixes")

    def stream(self, mix: str) -> StreamConfig:
        """Return the test stream of a task order."""
        return StreamConfig(
            self.tasks, self.n_prompts, mix, self.session_length, self.seed, self.split, self.source  # type: ignore[arg-type]
        )  # fmt: skip

    def warm_up(self) -> StreamConfig:
        """Return the warm-up: always a uniform mix, so that no task comes last."""
        return StreamConfig(
            self.tasks, self.warm_prompts, "uniform", self.session_length, self.seed, "profile", self.source  # type: ignore[arg-type]
        )  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """Routing of a model's warm-up and test streams, and the sizes needed to judge it.

    ``expert_bytes`` is one expert's, ``model_bytes`` the whole model's, in the checkpoint's own dtype.
    """

    model_hash: str
    data_hash: str
    dtype: str
    top_k: int
    expert_bytes: int
    model_bytes: int
    warm: tuple[PromptUse, ...]
    streams: dict[str, tuple[PromptUse, ...]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """MoE layers, and experts of the largest layer."""
        uses = self.warm or next(iter(self.streams.values()))
        layers, experts = uses[0].counts.shape
        return int(layers), int(experts)


class Recorder:
    """Records the streams of a configuration, or finds them cached, and remembers what was asked.

    Parameters
    ----------
    config : RecordingConfig
    progress : callable, optional
        Called with (stage, done, total).
    """

    def __init__(self, config: RecordingConfig, progress: Progress | None = None) -> None:
        self.checkpoint = resolve_model(config.model)
        self.index = open_checkpoint(self.checkpoint)
        self._config, self._progress = config, progress
        self._asked: list[Prompt] = []

    @property
    def data_hash(self) -> str:
        """Hash of all prompts so far, in their order."""
        return prompts_hash(self._asked)

    def reference(self, stage: str, stream: StreamConfig) -> Reference:
        """Return the all-resident outputs on a stream."""
        prompts, progress = prompt_stream(stream), self._progress
        self._asked += prompts
        return reference_outputs(
            self.checkpoint,
            [prompt.text for prompt in prompts],
            [prompt.task for prompt in prompts],
            max_new_tokens=self._config.max_new_tokens,
            dtype=self._config.dtype,
            device=resolve_device(self._config.device).type,
            progress=None if progress is None else (lambda done, total: progress(stage, done, total)),
        )


def record(config: RecordingConfig, progress: Progress | None = None) -> Recording:
    """Record what is not cached yet, and return it all; see `Recorder`."""
    recorder = Recorder(config, progress)

    def uses(stage: str, stream: StreamConfig) -> tuple[PromptUse, ...]:
        return tuple(prompt_uses(recorder.reference(stage, stream).trace))

    warm = uses("warm-up", config.warm_up()) if config.warm_prompts else ()
    streams = {mix: uses(mix, config.stream(mix)) for mix in (config.mixes if config.n_prompts else ())}
    for mix in config.unlabelled if config.n_prompts else ():
        streams[mix + UNLABELLED] = tuple(replace(use, task=UNKNOWN) for use in streams[mix])
    return _recording(recorder.index, recorder.data_hash, config.dtype, warm, streams)


def from_trace(model: str, trace: RoutingTrace, told: str = "trace") -> Recording:
    """Return a user's own routing as a recording: the first half of its requests warms up, the rest is the stream.

    Parameters
    ----------
    model : str
        The model that the routing is of.
    trace : RoutingTrace
        Of an engine that was loaded with ``record=True`` and gave every token the experts that it chose.
    told : str
        What to call the stream.

    Raises
    ------
    OptionError
        When it is of a model of another shape, or has fewer than two requests.
    """
    index = open_checkpoint(resolve_model(model))
    wanted = (len(index.layers), max(layer.num_experts for layer in index.layers))
    shape = (trace.chosen.shape[1], trace.experts)
    if shape != wanted:
        raise OptionError(
            f"the trace is of {shape[0]} layers of {shape[1]} experts, {model} has {wanted[0]} of {wanted[1]}: "
            f"name the model that it was recorded with"
        )
    uses = tuple(prompt_uses(trace))
    if len(uses) < 2:
        raise OptionError(f"the trace has {len(uses)} requests: the first half warms up, so it takes at least two")
    half = len(uses) // 2
    return _recording(index, "", str(index.dtype).removeprefix("torch."), uses[:half], {told: uses[half:]})


def _recording(
    index: CheckpointIndex,
    data_hash: str,
    dtype: str,
    warm: tuple[PromptUse, ...],
    streams: dict[str, tuple[PromptUse, ...]],
) -> Recording:
    expert_bytes = max(layer.record_bytes for layer in index.layers)
    model_bytes = index.expert_bytes_total + index.dense_bytes_total
    return Recording(index.source_hash, data_hash, dtype, index.top_k, expert_bytes, model_bytes, warm, streams)
