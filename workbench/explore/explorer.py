"""One engine, kept, and what a configuration of it comes to: memory, speed, quality, and an answer token by token.

`Explorer.observe` takes an `ExperimentConfig`. It loads the model anew only where slots, weights or predictor differ
from what is there, and restarts the engine otherwise, so that a configuration tried twice gives the same figures but
for times. Then

1. the prompts of the configuration's stream are scored against the all-resident model (quality, as in
`quality/experiment.py`),
2. the first of them is answered freely, token by token: this is timed, and its routing is kept.

Memory is measured within this process: the peak while it serves, minus what it held before the model was loaded.
Libraries that are first used by the model count for it, so a fresh process (notebook 01) is what claims should rest on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

import emoe_core
from emoe_core.config import EngineConfig
from emoe_core.device.cpu_memory import return_free_memory
from emoe_core.engine import RESTARTABLE
from emoe_core.errors import OptionError
from emoe_core.experts.trace import RoutingTrace
from emoe_core.planning.quality_target import plan_memory
from workbench.machine.busy import OtherWork
from workbench.machine.process_counters import status_bytes
from workbench.measure.peak_memory import device_peak_bytes, process_peak_bytes, reset_device_peak, reset_peak
from workbench.models.names import resolve_model
from workbench.quality.configuration import ORACLE, ExperimentConfig
from workbench.quality.experiment import all_resident, quality_metrics, score_prompts, warm_trace
from workbench.systems.option_names import resolve_options
from workbench.workloads import prompt_stream, prompts_hash

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Observation:
    """What a configuration came to.

    Attributes
    ----------
    config : ExperimentConfig
    metrics : dict
        Numbers, units in their names.
    requests : DataFrame
        One row a scored prompt.
    prompt : str
        The prompt that was answered.
    answer : Generation
    pieces : tuple of str
        Text of each token of the answer.
    trace : RoutingTrace
        Routing of that prompt and its answer.
    stats : RunStats
        Of everything since the engine was loaded or restarted.
    identity : dict
        Model hash, data hash, dtype, seed.
    """

    config: ExperimentConfig
    metrics: dict[str, float]
    requests: pd.DataFrame
    prompt: str
    answer: emoe_core.Generation
    pieces: tuple[str, ...]
    trace: RoutingTrace
    stats: emoe_core.RunStats
    identity: dict[str, Any]


class Explorer:
    """Keeps one engine for observations; use it as a context manager, or call `close`.

    Attributes
    ----------
    engine : Engine or None
        As the last observation left it.
    """

    def __init__(self) -> None:
        self.engine: emoe_core.Engine | None = None
        self._held_bytes = 0
        self._checkpoint: str | Path | None = None
        self._warm: dict[ExperimentConfig, RoutingTrace | None] = {}

    def observe(self, config: ExperimentConfig, progress: Progress | None = None) -> Observation:
        """Bring the engine to a configuration and measure it.

        Raises
        ------
        BudgetError
            When the budget cannot hold one expert a layer and one in flight. The engine is then as before, as after
            any other option that is refused.
        OptionError
            What only an experiment can run: the oracle, a profile.
        """
        if config.strategy == ORACLE or config.skipping or config.max_quality_loss is not None:
            raise OptionError(
                "explore a strategy of the engine's own, without a task profile; notebook 08 has the rest"
            )
        checkpoint = resolve_model(config.model)
        prompts = prompt_stream(config.stream())
        tell = progress or (lambda stage, done, total: None)
        reference = all_resident(config, checkpoint, prompts, "all-resident reference", progress)
        warm = self._warm_trace(config, checkpoint, progress)
        tell("loading", 0, 1)
        engine = self._bring(config, checkpoint)
        if warm is not None:
            engine.warm_start(warm)
        tell("loading", 1, 1)
        in_peak = reset_peak()
        reset_device_peak(engine.device)
        tasks = [prompt.task for prompt in prompts]
        requests = pd.DataFrame(score_prompts(engine, prompts, tasks, reference, config.stepwise, None, progress))
        engine.forget_trace()
        before, others = engine.stats().counters, OtherWork()
        tell("answering", 0, config.max_new_tokens)
        told = _counting(tell, config.max_new_tokens)
        answer = engine.generate([prompts[0].text], tasks[:1], max_new_tokens=config.max_new_tokens, on_token=told)[0]
        tell("answering", config.max_new_tokens, config.max_new_tokens)
        stats, others_share = engine.stats(), others.share()
        answering = stats.counters.since(before)
        held = process_peak_bytes() if in_peak else status_bytes("VmRSS") or 0
        longest = max(len(output.prompt_ids) for output in reference.outputs) + config.max_new_tokens
        on_device = device_peak_bytes(engine.device)
        computed_bytes = engine.memory(longest).total_bytes
        metrics = quality_metrics(requests) | {
            "computed_bytes": float(computed_bytes),
            "measured_bytes": float(on_device or held - self._held_bytes),
            "all_resident_bytes": float(computed_bytes - stats.slot_bytes + stats.expert_bytes),
            "slot_bytes": float(stats.slot_bytes),
            "ttft_s": answer.ttft_s,
            "tpot_s": answer.tpot_s if answer.tpot_s is not None else float("nan"),
            "answer_tokens_per_s": 1 / answer.tpot_s if answer.tpot_s else float("nan"),
            "others_cpu_share": others_share,
            "hit_rate": answering.hit_rate,
            "loads": float(answering.loads),
            "reroutes": float(answering.reroutes),
            "drops": float(answering.drops),
            "bytes_loaded": float(answering.bytes_loaded),
            "stall_s": answering.stall_s,
        }
        assert engine.tokenizer is not None
        pieces = tuple(str(engine.tokenizer.decode([token])) for token in answer.token_ids)
        identity = {
            "model_hash": engine.index.source_hash,
            "dtype": str(engine.index.dtype).removeprefix("torch."),
            "data_hash": prompts_hash(prompts),
            "reference_hash": reference.hash,
            "seed": config.seed,
        }
        trace = engine.trace()
        return Observation(config, metrics, requests, prompts[0].text, answer, pieces, trace, stats, identity)

    def close(self) -> None:
        """Close the engine and free its memory. Idempotent."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None

    def __enter__(self) -> Explorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bring(self, config: ExperimentConfig, checkpoint: str | Path) -> emoe_core.Engine:
        """Return the engine as a fresh load of a configuration would make it."""
        options = resolve_options(config.engine_options()) | {"record": True}
        engine = self.engine
        if engine is not None and checkpoint == self._checkpoint:
            wanted = EngineConfig(**options)
            # Refused here, a budget leaves the engine that is there.
            plan, _ = plan_memory(engine.index, wanted.budget, wanted.profile, wanted.max_quality_loss)
            changes = {name: options[name] for name in RESTARTABLE if name in options}
            if plan == engine.plan and replace(engine.config, **changes) == wanted:
                engine.restart(**changes)
                return engine
        del engine
        self.close()
        gc.collect()
        return_free_memory()
        self._held_bytes = status_bytes("VmRSS") or 0
        self.engine, self._checkpoint = emoe_core.load(checkpoint, **options), checkpoint
        return self.engine

    def _warm_trace(
        self, config: ExperimentConfig, checkpoint: str | Path, progress: Progress | None
    ) -> RoutingTrace | None:
        # The warm-up depends on nothing that a slider moves: all tasks teach the predictor.
        key = replace(config, budget=None, tolerance=0.0, cache_bias=0.0, interval=1, tasks=_ALL_TASKS)
        if key not in self._warm:
            self._warm[key] = warm_trace(key, checkpoint, progress)
        return self._warm[key]


_ALL_TASKS = ExperimentConfig().tasks


def _counting(tell: Progress, total: int) -> Callable[[int, str], None]:
    seen = 0

    def on_token(row: int, text: str) -> None:
        nonlocal seen
        seen = min(seen + 1, total)
        tell("answering", seen, total)

    return on_token
