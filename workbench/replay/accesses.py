"""Which experts each forward pass needs: recorded routing, cut into the steps in which an engine would ask for them.

Terms
-----
step
    One forward pass: the prompts of a batch, or one token of each of its continuations. All experts that a layer needs
    in a step are needed together.
accesses
    Per step and MoE layer, how many tokens chose each expert. What a cache sees of a workload; within a step
    resident experts come first, each group by ascending expert id, as the engine computes.

Reference outputs are scored in one pass over prompt and continuation. Attention is causal, so each continuation token
is routed as it would be when decoded alone (up to rounding); the last one is never fed to the model and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from emoe_core.errors import DataError, OptionError
from emoe_core.experts.trace import RoutingTrace
from workbench.replay.recording import Progress, Recorder, RecordingConfig
from workbench.replay.references import Reference


@dataclass(frozen=True)
class Accesses:
    """Accesses of S steps to L layers of E experts.

    Attributes
    ----------
    tokens : int32 [S, L, E]
        Tokens of the step that chose the expert.
    prefill : bool [S]
        Whether the step starts its requests.
    tasks : tuple of str, length S
        Task type of the step's requests; "mixed" when they differ.
    """

    tokens: np.ndarray
    prefill: np.ndarray
    tasks: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or not len(self.tokens) == len(self.prefill) == len(self.tasks):
            raise DataError("accesses are not [steps, layers, experts]: record them again")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def needed(self) -> np.ndarray:
        """Whether the step needs the expert, bool [S, L, E]."""
        return self.tokens > 0

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.tokens.shape[1])

    @property
    def experts(self) -> int:
        """Experts of the largest layer."""
        return int(self.tokens.shape[2])

    @property
    def lookups(self) -> int:
        """Distinct (step, layer, expert): what hits and misses are counted in."""
        return int(self.needed.sum())

    @property
    def compulsory(self) -> int:
        """Experts that are needed at all: the misses of a cache that holds everything and starts empty."""
        return int(self.needed.any(axis=0).sum())


def accesses_of(trace: RoutingTrace, prompt_tokens: Sequence[int] | None = None, *, batch_size: int = 1) -> Accesses:
    """Cut a trace into steps.

    Parameters
    ----------
    trace : RoutingTrace
        Requests are served in the order of their numbers.
    prompt_tokens : sequence of int, optional
        Length of each request's prompt, in that order; left out: as many tokens as the trace marks as prefill.
    batch_size : int
        Requests that are served together, each batch to its end before the next starts.

    Raises
    ------
    OptionError
        When ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}: give 1 or more")
    requests, place = np.unique(trace.request, return_inverse=True)
    if prompt_tokens is None:
        lengths = np.bincount(place, weights=trace.prefill, minlength=len(requests)).astype(np.int64)
    else:
        lengths = np.asarray(prompt_tokens, dtype=np.int64)
    # Within a batch: 0 is the pass over the prompts, then one pass for each further token.
    within = np.maximum(trace.position.astype(np.int64) - lengths[place] + 1, 0)
    batch = place // batch_size
    keys, step = np.unique(np.stack([batch, within]), axis=1, return_inverse=True)
    step = step.reshape(-1)
    steps, layers = keys.shape[1], trace.chosen.shape[1]
    layer = np.arange(layers)[None, :, None]
    cell = (step[:, None, None] * layers + layer) * trace.experts + trace.chosen.astype(np.int64)
    tokens = np.bincount(cell.ravel(), minlength=steps * layers * trace.experts).astype(np.int32)
    tasks = []
    for number in keys[0]:
        members = requests[number * batch_size : (number + 1) * batch_size]
        names = {trace.tasks[int(request)] for request in members}
        tasks.append(names.pop() if len(names) == 1 else "mixed")
    return Accesses(tokens.reshape(steps, layers, trace.experts), keys[1] == 0, tuple(tasks))


def accesses_of_reference(reference: Reference, *, batch_size: int = 1) -> Accesses:
    """Return the accesses that answering a reference's prompts makes, the last token of each answer left out."""
    trace = reference.trace
    prompts = np.array([len(output.prompt_ids) for output in reference.outputs])
    fed = prompts + np.array([max(len(output.token_ids) - 1, 0) for output in reference.outputs])
    kept = trace.position < fed[trace.request]
    columns = ("request", "position", "prefill", "chosen", "served", "weight")
    cut = replace(trace, **{name: getattr(trace, name)[kept] for name in columns})
    return accesses_of(cut, prompts.tolist(), batch_size=batch_size)


@dataclass(frozen=True)
class RoutingRecord:
    """Recorded routing of a model, as references and as accesses.

    ``expert_bytes`` is one expert's in the checkpoint's own dtype; ``warm`` is what may be known beforehand, None when
    nothing is.
    """

    model_hash: str
    data_hash: str
    top_k: int
    expert_bytes: int
    streams: dict[str, Accesses]
    references: dict[str, Reference]
    warm: Accesses | None


def record_accesses(config: RecordingConfig, *, batch_size: int = 1, progress: Progress | None = None) -> RoutingRecord:
    """Record the routing of a model's streams (what is not cached yet), and cut it into steps.

    Parameters
    ----------
    config : RecordingConfig
    batch_size : int
        Requests that are served together.
    progress : callable, optional
        Called with (stage, done, total).
    """
    recorder = Recorder(config, progress)
    warm = recorder.reference("warm-up", config.warm_up()) if config.warm_prompts else None
    references = {mix: recorder.reference(mix, config.stream(mix)) for mix in config.mixes}
    index = recorder.index
    return RoutingRecord(
        index.source_hash,
        recorder.data_hash,
        index.top_k,
        max(layer.record_bytes for layer in index.layers),
        {mix: accesses_of_reference(item, batch_size=batch_size) for mix, item in references.items()},
        references,
        None if warm is None else accesses_of_reference(warm, batch_size=batch_size),
    )
