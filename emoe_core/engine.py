"""Load a Mixture-of-Experts model under an expert budget and run it.

    with emoe_core.load("path/to/model", budget="40%") as engine:
        print(engine.generate(["What is a heron?"])[0].text)
        print(engine.stats().to_dict())

`Engine.model` is the stock transformers model; calling it or its ``generate`` directly works, each row then being an
anonymous request of unknown task. What is not resident is loaded (tolerance 0: bit-identical to stock eager) or
replaced by resident experts or dropped (tolerance > 0). The engine runs one forward pass at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emoe_core import generation
from emoe_core.checkpoint.index import CheckpointIndex, open_checkpoint
from emoe_core.config import EngineConfig, open_device
from emoe_core.device import short_of_memory
from emoe_core.device.cpu_memory import bound_kernel_caches, trim_during_prompts
from emoe_core.errors import OptionError, UnsupportedFamilyError
from emoe_core.experts import dispatch
from emoe_core.experts.attach import Attached, attach_layers, infer_only, refuse_misuse
from emoe_core.experts.rerouting import DROP
from emoe_core.experts.trace import RoutingTrace, TraceRecorder
from emoe_core.footprint import MemoryBreakdown, memory_breakdown
from emoe_core.generation import load_tokenizer
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.loader.eviction import make_table, policy_name
from emoe_core.loader.loader import ExpertLoader
from emoe_core.loader.pack import Pack, Progress, ensure_pack
from emoe_core.loader.slots import SlotTable
from emoe_core.loader.storage import HostMemory, PackedFile
from emoe_core.metrics import RunStats
from emoe_core.planning.control import ControlLoop
from emoe_core.planning.quality_target import plan_memory
from emoe_core.planning.tolerance import MissTolerance
from emoe_core.predictor import NO_PREDICTOR, Predictor, make_predictor
from emoe_core.scheduler.requests import Request
from emoe_core.serving.kv_cache import obstacle
from emoe_core.session import ForwardPasses
from emoe_core.timeline import Timeline


def load(checkpoint: str | Path, *, progress: Progress | None = None, **options: Any) -> Engine:
    """Load a checkpoint under an expert budget.

    Parameters
    ----------
    checkpoint : str or Path
        Directory of a Hugging Face checkpoint (safetensors), or a hub id when online.
    progress : callable, optional
        Called with (experts done, experts in all) while the expert pack is written, at the first load.
    **options
        Fields of `EngineConfig`.

    Raises
    ------
    OptionError
        Unknown option or value out of range.
    CheckpointError, UnsupportedFamilyError
        No model there, a dense model, damaged files, or a family that cannot be served.
    BudgetError
        The budget cannot hold one expert a layer and one in flight.
    """
    known = {item.name for item in dataclasses.fields(EngineConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}: the options are {', '.join(sorted(known))}")
    config = EngineConfig(**options)
    index = open_checkpoint(checkpoint, config.dtype).with_expert_dtype(config.expert_dtype)
    return Engine(index, config, progress)


# What `Engine.restart` changes: nothing that weights, files or slots depend on.
RESTARTABLE = ("tolerance", "on_miss", "cache_bias", "interval", "replan")


class Engine:
    """A loaded model; made by `load`. Use it as a context manager, or call `close`."""

    def __init__(self, index: CheckpointIndex, config: EngineConfig, progress: Progress | None = None) -> None:
        self.index = index
        self.config = config
        self.tolerance = config.tolerance
        self._device = open_device(config.device)
        self.device = self._device.torch_device
        self.plan, self.quality = plan_memory(index, config.budget, config.profile, config.max_quality_loss)
        layers = index.layers
        bound_kernel_caches(short_of_memory=not self.plan.all_resident)
        predictor = self._new_predictor()
        pack = ensure_pack(index, config.pack_dir or cache_dir() / "packs", progress)
        self._closed = False
        self._attached: Attached
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase | None
        with contextlib.ExitStack() as undo:
            storage = undo.enter_context(contextlib.closing(self._open_storage(pack)))
            self.loader = undo.enter_context(contextlib.closing(self._new_loader(storage)))
            self.control = self._new_control(predictor)
            self.recorder = TraceRecorder(len(layers), self._most_experts) if config.record else None
            self.passes = ForwardPasses(
                self.loader, self.control, self.recorder, self._miss_tolerance(), config.on_miss, config.cache_bias
            )
            dispatch.register()
            with short_of_memory(self._device, "the model beside its experts", index.dense_bytes_total):
                self.model = index.build_model(self.device, config.attn_implementation, dispatch.IMPLEMENTATION)
            self.tokenizer = load_tokenizer(index.path)
            self._attach()
            undo.pop_all()

    @property
    def one_at_a_time(self) -> str | None:
        """Why requests of this model cannot share a batch, or None where they can."""
        return obstacle(self._attached.cache, self.model.config)

    @property
    def reroutable(self) -> bool:
        """Whether a tolerance above 0 can be served."""
        return self._lossy(self.config)

    def generate(
        self,
        prompts: Sequence[str],
        tasks: Sequence[str | None] | None = None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 1,
        chat: bool = True,
        on_token: generation.OnToken | None = None,
    ) -> list[generation.Generation]:
        """Answer prompts greedily; see `generation.generate`."""
        return generation.generate(self, prompts, tasks, max_new_tokens, batch_size, chat, on_token)

    def restart(self, **changes: Any) -> None:
        """Begin anew, as a fresh load with changed options would, without reading the model again.

        Slots are emptied; counters, history and recorded routing are forgotten.

        Parameters
        ----------
        **changes
            Options of `EngineConfig` that are in `RESTARTABLE`; the others stay as they are.

        Raises
        ------
        OptionError
            An option that needs a new load, or a value out of range; the engine is as before.
        IntegrationError
            Requests are running.
        """
        fixed = sorted(set(changes) - set(RESTARTABLE))
        if fixed:
            raise OptionError(f"{', '.join(fixed)} needs a new load; restart changes {', '.join(RESTARTABLE)}")
        config = replace(self.config, **changes)
        self._require_reroutable(config)
        self.passes.require_idle()
        self.config, self.tolerance = config, config.tolerance
        self.loader.empty(self._new_table())
        self.control = self._new_control(self._new_predictor())
        self.passes.restart(self.control, self._miss_tolerance(), config.on_miss, config.cache_bias)
        self.forget_trace()

    def load_all(self) -> None:
        """Load every expert now, where each has a slot: on demand they would come one by one, long after loading."""
        if self.plan.all_resident:
            self.loader.swap([range(count) for count in self.plan.num_experts])
            self.loader.settle()

    def warm_start(self, trace: RoutingTrace) -> int:
        """Teach the predictor a recorded workload, request by request; return how many it saw."""
        if self.control.predictor is None:
            return 0
        requests = sorted(trace.tasks)
        for request in requests:
            self.control.predictor.observe(trace.tasks[request], trace.counts(request))
        return len(requests)

    def trace(self) -> RoutingTrace:
        """Return the routing recorded since loading (needs ``record=True``)."""
        if self.recorder is None:
            raise OptionError("routing was not recorded: load with record=True")
        return self.recorder.trace()

    def forget_trace(self) -> None:
        """Drop the routing recorded so far, and go on recording."""
        if self.recorder is not None:
            self.recorder.clear()

    @contextlib.contextmanager
    def timeline(self) -> Iterator[Timeline]:
        """Record when requests, predictions, swaps, passes, loads and stalls happen meanwhile; see `timeline.py`."""
        timeline = Timeline()
        parts = (self.loader, self.control, self.passes)
        try:
            for part in parts:
                part.timeline = timeline
            yield timeline
        finally:
            for part in parts:
                part.timeline = None
            self.loader.settle()  # what was asked for meanwhile is in the record

    def stats(self) -> RunStats:
        """Return counters, memory and configuration; a snapshot."""
        self.loader.counters.check()
        entries = list(self.loader.table.entries())
        return RunStats(
            counters=replace(self.loader.counters),
            experts=sum(self.plan.num_experts),
            slots=self.loader.table.slots,
            resident_experts=len(entries),
            slot_bytes=self.loader.slot_bytes,
            expert_bytes=self.index.expert_bytes_total,
            dense_bytes=self.index.dense_bytes_total,
            top_k_share=self.plan.top_k_share,
            tolerance=self.tolerance,
            on_miss=self.config.on_miss,
            policy=policy_name(self.config.policy),
            predictor=NO_PREDICTOR if self.control.predictor is None else self.control.predictor.name,
            interval=self.config.interval,
            cold_start=self.control.cold,
            storage=self.loader.storage.description,
            requests_served=self.control.finished,
            compute=self._compute,
            rerouting="by its rule"
            if self._attached.exact_only is None
            else f"exact only: {self._attached.exact_only}",
            extra={"prediction_s": self.control.prediction_s, "cache_bias": self.config.cache_bias},
        )

    @property
    def host_waits(self) -> int:
        """How often the thread that runs the model has waited for the device; never on the CPU."""
        return self._device.host_waits

    def memory(self, max_tokens: int = 2048, batch: int = 1) -> MemoryBreakdown:
        """Return every term of this engine's memory for sequences of ``max_tokens``; estimates but for the slots."""
        return memory_breakdown(self.index, self.plan, max_tokens, batch, device=self._device)

    def reset_counters(self) -> None:
        """Start counting anew; residents and history stay."""
        self.loader.reset_counters()
        self.control.prediction_s = 0.0

    def close(self) -> None:
        """Stop loading threads, close files and free the slots. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.passes.close()
        self.loader.close()
        for layer in self.index.layers:
            dispatch.detach(self.model.get_submodule(layer.name))

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def admit(self, tasks: Sequence[str], input_tokens: Sequence[int]) -> list[Request]:
        """Admit the requests of a batch and seat them: the next prefill holds their rows, in order.

        Raises
        ------
        IntegrationError
            When the engine is closed, or another batch is not finished.
        """
        self.passes.require_free()
        requests = [Request(task, count) for task, count in zip(tasks, input_tokens, strict=True)]
        self.passes.admit(requests)
        self.passes.seat(requests)
        return requests

    def finish(self, requests: Sequence[Request]) -> None:
        """End admitted requests."""
        self.passes.finish(requests)

    @property
    def _compute(self) -> str:
        """Which form computes experts."""
        if self._attached.eager_because is not None:
            return f"the family's eager code ({self._attached.eager_because})"
        rounded = self.config.expert_dtype == "int8"
        return "grouped by expert, " + ("8 bits, equal within rounding" if rounded else "each bit-equal to eager")

    @property
    def _most_experts(self) -> int:
        """Experts of the largest layer."""
        return max(self.plan.num_experts)

    def _open_storage(self, pack: Pack) -> PackedFile | HostMemory:
        config = self.config
        if config.tier == "disk":
            return PackedFile(pack, config.direct, config.verify)  # type: ignore[arg-type]
        return HostMemory(pack, self._device, config.verify)  # type: ignore[arg-type]

    def _new_loader(self, storage: PackedFile | HostMemory) -> ExpertLoader:
        return ExpertLoader(self.index.layers, storage, self._new_table(), self._device, self.config.threads)

    def _new_table(self) -> SlotTable:
        return make_table(self.plan.slots_per_layer, self.plan.staging_slots, self.config.policy, self._most_experts)

    def _new_predictor(self) -> Predictor | None:
        config, layers = self.config, len(self.index.layers)
        return make_predictor(
            config.predictor, layers, self._most_experts, config.seed, config.predictor_path, self.index.source_hash
        )

    def _new_control(self, predictor: Predictor | None) -> ControlLoop:
        config, profile = self.config, self.config.profile
        # A quality target decides by itself who may reroute; of the profile, output lengths remain.
        if profile is not None and self.quality is not None:
            profile = profile.without_masks()
        return ControlLoop(self.loader, predictor, config.interval, config.replan, profile)

    def _miss_tolerance(self) -> MissTolerance:
        return MissTolerance(self.tolerance, self.config.profile, self.quality)

    def _attach(self) -> None:
        self._attached = attach_layers(self.model, self.index, self.loader, self.passes)
        self._require_reroutable(self.config)
        if not self.plan.all_resident:
            # Handing memory back costs a tenth of a prompt's time: only where it is short.
            trim_during_prompts([self.model.get_submodule(layer.name) for layer in self.index.layers])
        self.model.register_forward_pre_hook(self.passes.begin, with_kwargs=True)
        self.model.register_forward_hook(self.passes.end, always_call=True)
        infer_only(self.model)
        refuse_misuse(self.model)

    def _lossy(self, config: EngineConfig) -> bool:
        """Say whether choices can be given up: dropping needs no routing rule."""
        return self._attached.exact_only is None or config.on_miss == DROP

    def _require_reroutable(self, config: EngineConfig) -> None:
        profile = self.control.profile
        skips = profile is not None and not all(all(task.sensitive) for task in profile.tasks.values())
        skips = skips or bool(config.max_quality_loss)
        if not self._lossy(config) and (skips or config.tolerance > 0):
            raise UnsupportedFamilyError(
                f"{self.index.model_type} cannot be rerouted: {self._attached.exact_only}. Load with tolerance=0 and "
                f'no profile, or with on_miss="drop".'
            )
