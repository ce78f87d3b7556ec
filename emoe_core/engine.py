"""Load a Mixture-of-Experts model under an expert budget and run it.

    with emoe_core.load("path/to/model", budget="40%") as engine:
        print(engine.generate(["What is a heron?"])[0].text)
        print(engine.stats().to_dict())

`Engine.model` is the stock transformers model; calling it or its ``generate`` directly works, each row then being an
anonymous request of unknown task. What is not resident is loaded (tolerance 0: bit-identical to stock eager) or
replaced by resident experts (tolerance > 0). The engine runs one forward pass at a time.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import experts, generation
from .budget import SlotPlan, plan_slots
from .cache import cache_dir
from .checkpoint import CheckpointIndex, open_checkpoint
from .context import StepContext
from .control import ControlLoop
from .errors import IntegrationError, OptionError, UnsupportedFamilyError
from .footprint import MemoryBreakdown, memory_breakdown
from .interval import make_interval
from .loader import ExpertLoader
from .metrics import RunStats
from .options import EngineConfig, resolve_device
from .pack import Progress, ensure_pack
from .predictor import make_predictor
from .routing import RoutingTrace, TraceRecorder
from .slots import SlotTable
from .storage import HostMemory, PackedFile
from .tasks import UNKNOWN


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
    return Engine(open_checkpoint(checkpoint, config.dtype), config, progress)


class Engine:
    """A loaded model; made by `load`. Use it as a context manager, or call `close`."""

    def __init__(self, index: CheckpointIndex, config: EngineConfig, progress: Progress | None = None) -> None:
        self.index = index
        self.config = config
        self.tolerance = config.tolerance
        self.device = resolve_device(config.device)
        self.plan: SlotPlan = plan_slots(index, config.budget)
        if config.profile is not None:
            config.profile.require_model(index.source_hash)
        layers = index.layers
        num_experts = max(layer.num_experts for layer in layers)
        predictor = make_predictor(
            config.predictor, len(layers), num_experts, config.seed, config.predictor_path, index.source_hash
        )
        pack = ensure_pack(index, config.pack_dir or cache_dir() / "packs", progress)
        table = SlotTable(self.plan.slots_per_layer, self.plan.spare_slots, config.policy)
        storage: PackedFile | HostMemory
        if config.tier == "disk":
            storage = PackedFile(pack, config.direct, config.verify)  # type: ignore[arg-type]
        else:
            storage = HostMemory(pack, self.device.type == "cuda", config.verify)  # type: ignore[arg-type]
        try:
            self.loader = ExpertLoader(layers, storage, table, self.device, config.threads)
        except BaseException:
            storage.close()
            raise
        interval = make_interval(config.interval, config.min_coverage)
        self.control = ControlLoop(self.loader, predictor, interval, config.replan, config.profile)
        self.step: StepContext | None = None
        self.recorder = TraceRecorder(len(layers), num_experts) if config.record else None
        self._forward = 0
        self._assigned: list[int] | None = None
        self._open: list[int] = []
        self._runner: threading.Thread | None = None
        self._runner_lock = threading.Lock()
        self._closed = False
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase | None
        try:
            experts.register()
            self.model = index.build_model(self.device, config.attn_implementation, experts.IMPLEMENTATION)
            self.tokenizer = _tokenizer(index.path)
            self.model.requires_grad_(False)
            self._attach()
        except BaseException:
            self.loader.close()
            raise

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

    def score(
        self, sequences: Sequence[generation.TokenPair], tasks: Sequence[str | None] | None = None
    ) -> list[generation.Scored]:
        """Return teacher-forced log-probabilities of given continuations; see `generation.score`."""
        return generation.score(self, sequences, tasks)

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
            policy=self.config.policy,
            predictor=self.config.predictor or "none",
            interval=self.config.interval,
            cold_start=self.control.cold,
            storage=self.loader.storage.description,
            requests_served=self.control.finished,
            extra={"prediction_s": self.control.prediction_s},
        )

    def memory(self, max_tokens: int = 2048, batch: int = 1) -> MemoryBreakdown:
        """Return every term of this engine's memory for sequences of ``max_tokens``; estimates but for the slots."""
        return memory_breakdown(self.index, self.plan, max_tokens, batch)

    def reset_counters(self) -> None:
        """Start counting anew; residents and history stay."""
        self.loader.reset_counters()
        self.control.prediction_s = 0.0

    def close(self) -> None:
        """Stop loading threads, close files and free the slots. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.loader.close()
        for layer in self.index.layers:
            experts.detach(self.model.get_submodule(layer.name))

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        head = f"<b>{self.index.model_type}</b> {self.index.path.name}, {self.index.dtype}, {self.device}"
        return f"<p>{head}, budget {self.config.budget}, tolerance {self.tolerance}</p>{self.stats()._repr_html_()}"

    # What the layers ask of their session (see experts.Session).

    def tolerance_of(self, task: str, layer: int) -> float:
        """Miss tolerance of a (task, layer) in [0, 1]."""
        return self.control.tolerance(task, layer, self.tolerance)

    def observe(self, layer: int, chosen: torch.Tensor, step: StepContext | None) -> None:
        """Take one layer's desired experts for the history of the running requests."""
        self.control.observe(layer, chosen, step)

    def admit(self, tasks: Sequence[str], input_tokens: Sequence[int]) -> list[int]:
        """Admit requests whose rows the next prefill will hold, in order; return their numbers.

        Raises
        ------
        IntegrationError
            When the engine is closed, or other admitted requests are not finished.
        """
        self._require_open()
        if self._assigned is not None:
            raise IntegrationError("this engine answers one batch at a time: finish it, or load a second engine")
        self._end_anonymous()
        self._assigned = self.control.admit(tasks, input_tokens)
        return self._assigned

    def finish(self, numbers: Sequence[int]) -> None:
        """End admitted requests."""
        self.control.finish(numbers)
        self._assigned = None

    def _attach(self) -> None:
        model = self.model
        routers = _routers(model)
        hidden_size = model.config.get_text_config().hidden_size
        unexplained = []
        for layer in self.index.layers:
            module = model.get_submodule(layer.name)
            handle = experts.LayerHandle(layer.index, module, self.loader, self)
            found = routers.get(layer.name.rsplit(".", 1)[0])
            if found is not None:
                handle.attach_router(*found, hidden_size)
            if handle.rule is None:
                unexplained.append(layer.name)
            experts.attach(module, handle)
        profile = self.config.profile
        skips = profile is not None and not all(all(task.sensitive) for task in profile.tasks.values())
        if unexplained and (skips or self.tolerance > 0):
            raise UnsupportedFamilyError(
                f"{self.index.model_type} is served exactly only: no known routing rule explains the router of "
                f"{unexplained[0]}. Load with tolerance=0 and no profile."
            )
        model.register_forward_pre_hook(self._begin_pass, with_kwargs=True)
        model.register_forward_hook(self._end_pass, always_call=True)
        for name, reason in _REFUSED.items():
            setattr(model, name, _refuse(f"{name}: {reason}"))

    def _begin_pass(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._require_open()
        self._start_running()
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            return
        batch, length = int(inputs.shape[0]), int(inputs.shape[1])
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        real = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
            rows = mask[:, mask.shape[1] - length :].bool().cpu()
            if not bool(rows.all()) and bool(rows.any()):
                real = rows.reshape(-1)
        numbers = self._assigned if self._assigned is not None and len(self._assigned) == batch else None
        if numbers is None:
            if past == 0 or len(self._open) != batch:
                self._end_anonymous()
                tokens = [length] * batch if real is None else real.view(batch, length).sum(dim=1).tolist()
                self._open = self.control.admit([UNKNOWN] * batch, tokens)
            numbers = self._open
        self.loader.reap()
        self.loader.table.forward = self._forward
        running = self.control.running
        tasks = tuple(running[number].task if number in running else UNKNOWN for number in numbers)
        self.step = StepContext(self._forward, tuple(numbers), tasks, length, past == 0, real)
        self._forward += 1
        self.loader.counters.forwards += 1

    def _end_pass(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._runner is not threading.current_thread():
            # A pass that was refused ends here too; the one in progress is another thread's.
            return
        step, self.step, self._runner = self.step, None, None
        if step is not None and self.recorder is not None:
            self.recorder.end_of_pass(step)

    def _start_running(self) -> None:
        thread = threading.current_thread()
        with self._runner_lock:
            before = self._runner
            if before is not None and before is not thread and before.is_alive():
                raise IntegrationError("this engine runs one forward pass at a time: wait, or load a second engine")
            self._runner = thread
        if before is not None:
            # torch skips its hooks on an interrupt from the keyboard, so that pass never said that it ended.
            self.step = None
            self.loader.recover()

    def _require_open(self) -> None:
        if self._closed:
            raise IntegrationError("the engine of this model is closed: load it again")

    def _end_anonymous(self) -> None:
        self.control.finish(self._open)
        self._open = []


_REFUSED = {
    "save_pretrained": "the routed experts rest outside this model; copy the original checkpoint instead",
    "state_dict": "the routed experts rest outside this model; read the original checkpoint instead",
    "to": "an emoe model cannot be moved or converted; load it with device=... and dtype=...",
    "_apply": "an emoe model cannot be moved or converted; load it with device=... and dtype=...",
}


def _refuse(reason: str) -> Any:
    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise IntegrationError(reason)

    return refused


def _tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(path)


def _routers(model: PreTrainedModel) -> dict[str, tuple[torch.nn.Module, int]]:
    """Return, per parent module name, the router and the place of its logits, as the family declares them."""
    declared = []
    for module in model.modules():
        recorded = getattr(type(module), "_can_record_outputs", None) or {}
        found = recorded.get("router_logits") if isinstance(recorded, dict) else None
        if found is not None:
            declared += list(found) if isinstance(found, (list, tuple)) else [found]
    targets = {recorder.target_class: recorder.index for recorder in declared if hasattr(recorder, "target_class")}
    return {
        name.rsplit(".", 1)[0]: (module, targets[type(module)])
        for name, module in model.named_modules()
        if type(module) in targets
    }
