"""What a quality target needs beyond sensitivity: how well a task's usual experts cover its prompts, and a loss scale.

Both are measured on the prompts of a task profile, split in two halves: experts are counted on one half and judged on
the other, then the halves change places (terms and the model of the loss: `emoe_core.planning.quality_target`).

* Coverage comes from the routing of the all-resident reference outputs; no model runs.
* The scale holds the model of the loss against the engine. With ``slots`` experts a layer, tolerance 1 and the
  frequency predictor, each half is scored by teacher forcing after the other half taught the predictor. Loss is the
  mean log-probability lost per token or the mean KL divergence, whichever is larger: with few prompts the former may be
  negative by chance. The scale is measured loss / modelled loss, the largest over ``slots``: it errs towards caution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.experts.trace import RoutingTrace
from emoe_core.planning.quality_target import unscaled_loss_nats
from emoe_core.planning.tasks import Profile
from workbench.quality.token_quality import compare
from workbench.replay.references import Reference, ReferenceOutput
from workbench.replay.scoring import score

Progress = Callable[[str, int, int], None]


def coverage(trace: RoutingTrace, num_experts: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Return per layer, for 0..E slots, the share of choices covered by the experts that other prompts used most.

    Parameters
    ----------
    trace : RoutingTrace
        Of two or more prompts of one task.
    num_experts : sequence of int
        Experts of each MoE layer.

    Returns
    -------
    tuple of tuple of float
        Row l has E_l + 1 entries, rising from 0 to 1: the mean over the two halves. With a single prompt, which can
        say nothing about others, s slots cover s / E.
    """
    requests = sorted(trace.tasks)
    halves = [sum((trace.counts(request) for request in requests[start::2]), np.zeros(1)) for start in (0, 1)]
    if len(requests) < 2:
        return tuple(tuple(slots / experts for slots in range(experts + 1)) for experts in num_experts)
    rows = []
    for layer, experts in enumerate(num_experts):
        curves = []
        for counted, judged in (halves, halves[::-1]):
            order = np.argsort(-counted[layer][:experts], kind="stable")
            covered = np.cumsum(judged[layer][order]) / judged[layer].sum()
            curves.append(np.concatenate([[0.0], covered]))
        row = np.clip(np.mean(curves, axis=0), 0.0, 1.0)
        rows.append((*(round(float(value), 5) for value in row[:-1]), 1.0))
    return tuple(rows)


def extend(
    checkpoint: str | Path,
    profile: Profile,
    references: Mapping[str, Reference],
    slots: Sequence[int],
    options: Mapping[str, Any],
    progress: Progress | None = None,
) -> Profile:
    """Return the profile with coverage and loss scales; what it had stays as it was.

    Parameters
    ----------
    checkpoint : str or Path
    profile : Profile
        With divergences of single layers.
    references : mapping
        All-resident outputs of each task's prompts; two prompts or more for a scale.
    slots : sequence of int
        Slots a layer at which the loss is measured; a layer with fewer experts keeps them all.
    options : mapping
        Of `emoe_core.load`: dtype and the like.
    progress : callable, optional
        Called with (stage, done, total).
    """
    index = open_checkpoint(checkpoint)
    experts = [layer.num_experts for layer in index.layers]
    covered = {
        name: replace(task, coverage=coverage(references[name].trace, experts)) for name, task in profile.tasks.items()
    }
    measurable = [name for name, task in covered.items() if task.layer_kl_nats and len(references[name].outputs) > 1]
    scales: dict[str, list[float]] = {name: [] for name in measurable}
    total = len(slots) * sum(len(references[name].outputs) for name in measurable)
    done = 0
    for count in slots if measurable else ():
        losses: dict[str, list[np.ndarray]] = {name: [] for name in measurable}
        for half in (0, 1):
            given: dict[str, Any] = {"budget": f"{count} slots", "tolerance": 1.0, "predictor": "frequency"}
            with emoe_core.load(checkpoint, **options, **given) as engine:
                for name in measurable:
                    engine.warm_start(_half(references[name].trace, 1 - half))
                for name in measurable:
                    for output in references[name].outputs[half::2]:
                        losses[name].append(_loss_nats(engine, name, output))
                        done += 1
                        if progress is not None:
                            progress("loss with few slots", done, total)
        for name in measurable:
            modelled = unscaled_loss_nats(covered[name], [min(count, most) for most in experts])
            if modelled > 0:
                scales[name].append(max(0.0, float(np.concatenate(losses[name], axis=1).mean(axis=1).max())) / modelled)
    return replace(
        profile,
        tasks={
            name: replace(task, loss_scale=max(scales.get(name, []), default=None)) for name, task in covered.items()
        },
    )


def _half(trace: RoutingTrace, half: int) -> RoutingTrace:
    """Return every second prompt of a trace."""
    tasks = {request: trace.tasks[request] for request in sorted(trace.tasks)[half::2]}
    rows = np.isin(trace.request, list(tasks))
    columns = ("request", "position", "prefill", "chosen", "served", "weight")
    return replace(trace, tasks=tasks, **{name: getattr(trace, name)[rows] for name in columns})


def _loss_nats(engine: emoe_core.Engine, task: str, output: ReferenceOutput) -> np.ndarray:
    """Return a prompt's loss per token, [2, n]: log-probability lost, and KL divergence."""
    scored = score(engine, [(output.prompt_ids, output.token_ids)], [task])[0]
    head = engine.model.get_output_embeddings()
    with torch.no_grad():
        expected, found = (head(states.to(engine.device)).float().cpu() for states in (output.hidden, scored.hidden))
    quality = compare(expected, found, torch.tensor(output.token_ids))
    return np.stack([quality.log_ratio_nats, quality.kl_nats])
