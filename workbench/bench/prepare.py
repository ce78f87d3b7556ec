"""Everything that is made or measured once before a bench's processes run, kept in ``prepared.json``.

The pack and the GGUF file are written, the tokens chosen, their routing recorded, the disk and the memory measured, and
the expert budget derived from the limit. None of it runs under the limit or counts in a system's times.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from emoe_core.budget import SlotPlan, plan_slots
from emoe_core.checkpoint.index import CheckpointIndex, open_checkpoint
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.loader.pack import ensure_pack
from workbench.bench.bandwidth import Bandwidths, measure_bandwidths
from workbench.bench.forced_tokens import ForcedTokens, forced_tokens
from workbench.bench.limit_budget import control_bytes, limit_budget, require_possible
from workbench.bench.plan import PREPARED_FILE, BenchPlan
from workbench.bench.routing_pass import RoutingPass, routing_pass
from workbench.machine.control_groups import Controller
from workbench.machine.environment import describe_environment
from workbench.models.names import resolve_model
from workbench.systems.systems import System, require_runnable

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What the processes of a bench are given, and what their figures are held against.

    ``facts`` is what ``prepared.json`` holds: sizes, bandwidths, budget terms, the machine.
    """

    index: CheckpointIndex
    slots: SlotPlan
    forced: ForcedTokens
    routing: RoutingPass
    bandwidths: Bandwidths
    warm_trace: Path
    gguf: Path | None
    files: tuple[Path, ...]
    facts: dict[str, Any]

    def spec(self, plan: BenchPlan, system: System) -> dict[str, Any]:
        """Return what a measured process of a system is told."""
        spec = common_spec(plan, str(self.index.path), self.forced)
        options = dict(system.options)
        if system.budgeted:
            options["budget"] = int(self.slots.budget_bytes)
        if system.adapter == "accelerate" and "cpu_bytes" not in options:
            options["cpu_bytes"] = self.facts["accelerate_bytes"]
        taught = system.options.get("predictor") is not None
        scratch = cache_dir() / "bench-scratch"
        scratch.mkdir(exist_ok=True)
        return {
            **spec,
            "adapter": system.adapter,
            "options": options,
            "warm_trace": str(self.warm_trace) if taught else None,
            "gguf": None if self.gguf is None else str(self.gguf),
            "scratch": str(scratch),
        }


def common_spec(plan: BenchPlan, checkpoint: str, forced: ForcedTokens) -> dict[str, Any]:
    """Return the part of a spec that all systems share."""
    sequences = {name: list(value) for name, value in asdict(forced).items() if name != "source"}
    return {
        **sequences,
        "checkpoint": checkpoint,
        "dtype": plan.dtype,
        "threads": plan.threads,
        "max_tokens": plan.max_tokens,
        "max_seconds": plan.max_seconds,
    }


def prepare(plan: BenchPlan, folder: Path, controller: Controller | None, report: Report) -> Prepared:
    """Make or read back what a bench needs.

    Parameters
    ----------
    plan : BenchPlan
    folder : Path
        Of the bench.
    controller : Controller or None
        Needed with a limit.
    report : callable
        Called with (stage, done, total).

    Raises
    ------
    OptionError
        A system that is asked for cannot run here, or the tokens do not suffice.
    BudgetError
        The limit is too small.
    """
    systems = plan.found_systems()
    require_runnable(systems)
    index = open_checkpoint(resolve_model(plan.model), plan.dtype)
    if plan.limit_bytes is not None and plan.budget is None:
        require_possible(index, plan.limit_bytes, plan.max_tokens)
    pack = ensure_pack(index, cache_dir() / "packs", lambda done, total: report("expert pack", done, total))
    gguf = None
    if any(system.adapter == "llama.cpp" for system in systems):
        from workbench.systems.gguf_export import ensure_gguf

        gguf = ensure_gguf(index, lambda done, total: report("GGUF file", done, total))
    vocab = index.config.get_text_config().vocab_size
    sizes = (plan.prompt_tokens, plan.warm_tokens, plan.tokens)
    forced = forced_tokens(index.path, vocab, *sizes, plan.seed)
    report("routing of the tokens", 0, 1)
    routing = routing_pass(index.path, forced, plan.dtype)
    report("routing of the tokens", 1, 1)
    stored = folder / PREPARED_FILE
    facts: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    if facts.get("model_hash") != index.source_hash:
        report("bandwidths", 0, 1)
        facts = _facts(plan, index, forced, routing, measure_bandwidths(pack, plan.threads), controller)
        report("bandwidths", 1, 1)
        stored.write_text(json.dumps(facts, indent=1))
    slots = plan_slots(index, facts["expert_budget"])
    warm = folder / "warm_trace.npz"
    _first_request(routing, warm)
    files = (*(shard.file for shard in index.shards), pack.path, *([gguf] if gguf else []))
    bandwidths = Bandwidths(**facts["bandwidths"])
    return Prepared(index, slots, forced, routing, bandwidths, warm, gguf, files, facts)


def _facts(
    plan: BenchPlan,
    index: CheckpointIndex,
    forced: ForcedTokens,
    routing: RoutingPass,
    bandwidths: Bandwidths,
    controller: Controller | None,
) -> dict[str, Any]:
    terms: dict[str, int] | None = None
    budget: str | int = plan.budget or "100%"
    accelerate = index.expert_bytes_total + index.dense_bytes_total
    if plan.limit_bytes is not None:
        assert controller is not None
        spec = common_spec(plan, str(index.path), forced) | {"adapter": "emoe"}
        control = control_bytes(spec, plan.limit_bytes, controller)
        accelerate = _accelerate_bytes(index, plan.limit_bytes, control)
        if plan.budget is None:
            found = limit_budget(index, plan.limit_bytes, control, plan.max_tokens)
            terms, budget = found.to_dict(), found.expert_bytes
    config: Any = index.config.get_text_config()
    return {
        "model_hash": index.source_hash,
        "expert_budget": budget,
        "budget_terms": terms,
        "accelerate_bytes": accelerate,
        "record_bytes": max(layer.record_bytes for layer in index.layers),
        "expert_bytes": index.expert_bytes_total,
        "dense_bytes": index.dense_bytes_total,
        # A token reads one row of the input embedding and everything else that is dense.
        "token_dense_bytes": index.dense_bytes_total - config.vocab_size * config.hidden_size * index.dtype.itemsize,
        "tokens_from": forced.source,
        "routing_agreement": routing.agreement,
        "bandwidths": bandwidths.to_dict(),
        "limit_by": None if controller is None else controller.description,
        "environment": describe_environment().to_dict(),
    }


def _accelerate_bytes(index: CheckpointIndex, limit_bytes: int, control: int) -> int:
    """Return what accelerate may fill with modules: it reads whole layers, so two of them stay free, and a tenth."""
    per_layer = index.expert_bytes_total // len(index.layers)
    return max(1, int(0.9 * limit_bytes) - control - 2 * per_layer)


def _first_request(routing: RoutingPass, path: Path) -> None:
    """Keep the warm-up's routing alone: what a predictor may have seen before the timed tokens."""
    trace = routing.trace
    kept = trace.request == trace.request.min()
    columns = ("request", "position", "prefill", "chosen", "served", "weight")
    number = int(np.asarray(trace.request.min()))
    warm = replace(trace, **{name: getattr(trace, name)[kept] for name in columns}, tasks={number: trace.tasks[number]})
    warm.save(path)
