"""Finding each MoE layer's router and its routing rule, by watching one forward pass over random tokens.

Families call their routers in many ways (with a bias from outside, on two or three dimensions, with the previous
layer's state), so none is called here: the stock model runs once, its experts answer with zeros, and hooks keep what
the modules beside each experts module returned. One of them is the router: it gave a value for every expert, and a
rule (`emoe_core.experts.routing_rules`) explains from these values which experts were then asked for, and with what
weights.

A layer that the pass did not reach (experts for images) is reported as not called. The pass also shows what kind of
cache the model keeps, and why it failed where it did: some families do not run on bare token ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from emoe_core.errors import is_out_of_memory
from emoe_core.experts.dispatch import attach, attached_to, detach
from emoe_core.experts.routing_rules import Choice, RoutingRule, find_rule

WATCHED_TOKENS = 64
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class WatchedRouter:
    """A layer's router as it was seen.

    Attributes
    ----------
    router : torch.nn.Module
    position : int or None
        Where its logits [..., E] are in its output; None if they are the output.
    rule : RoutingRule
    """

    router: torch.nn.Module
    position: int | None
    rule: RoutingRule

    def logits(self, output: Any) -> torch.Tensor:
        """Return the logits [T, E] within the router's output."""
        logits: torch.Tensor = output if self.position is None else output[self.position]
        return logits.reshape(-1, logits.shape[-1])


@dataclass(frozen=True)
class Watched:
    """What one pass over random tokens showed.

    Attributes
    ----------
    routers : dict
        By name, each called layer's router, or None where no rule explains it.
    cache : Any
        What the model returned as its cache; None where it keeps none, or the pass failed.
    failure : str or None
        What the pass failed of; layers behind that have no router then.
    """

    routers: dict[str, WatchedRouter | None]
    cache: Any = None
    failure: str | None = None


def watch_routers(model: PreTrainedModel, layers: Mapping[str, int]) -> Watched:
    """Watch the layers' routers during one pass.

    Parameters
    ----------
    model : PreTrainedModel
        Loaded to run as "emoe".
    layers : mapping of str to int
        Experts of each MoE layer, by the name of its experts module.

    Raises
    ------
    MemoryError, torch.OutOfMemoryError, RuntimeError
        When memory runs out.
    """
    found: dict[str, WatchedRouter | None] = {}
    hooks = []
    watchers: dict[torch.nn.Module, Call] = {}
    for name, num_experts in layers.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        experts = model.get_submodule(name)
        seen: list[_Seen] = []
        for child in (*parent.children(), *experts.children()):
            if child is not experts:
                hooks.append(child.register_forward_hook(_keeper(seen), with_kwargs=True))
        watchers[experts] = _asked(found, name, parent, seen, num_experts)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (1, WATCHED_TOKENS), generator=generator).to(model.device)
    # Nobody reads the logits: the output head of 64 tokens can take as long as everything before it.
    accepts = inspect.signature(type(model).forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
    try:
        with torch.no_grad(), watching(watchers):
            output = model(input_ids=ids, use_cache=True, **extra)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A family that does not run on bare token ids is served exactly only; each says so in its own way.
        return Watched(dict.fromkeys(layers) | found, failure=f"{type(error).__name__}: {error}")
    finally:
        for hook in hooks:
            hook.remove()
    return Watched(found, getattr(output, "past_key_values", None))


@contextmanager
def watching(calls: Mapping[torch.nn.Module, Call]) -> Iterator[None]:
    """Let experts modules answer with zeros, and tell what each is asked: hidden [T, H], index and weights [T, k]."""
    before = {module: attached_to(module) for module in calls}
    try:
        for module, call in calls.items():
            attach(module, _Watcher(call))
        yield
    finally:
        for module, layer in before.items():
            detach(module)
            if layer is not None:
                attach(module, layer)


class _Watcher:
    """Serves experts with zeros."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Tell what is asked, and return zeros [T, H]."""
        self._call(hidden, index, weights)
        return torch.zeros_like(hidden)


@dataclass(frozen=True)
class _Seen:
    """One call of a module beside the experts."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    output: Any


def _keeper(seen: list[_Seen]) -> Callable[..., None]:
    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append(_Seen(module, (*args, *kwargs.values()), output))

    return keep


def _asked(
    found: dict[str, WatchedRouter | None], name: str, parent: torch.nn.Module, seen: list[_Seen], num_experts: int
) -> Call:
    def asked(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        candidates = [_explain(call, parent, index, weights, num_experts) for call in seen]
        seen.clear()
        found[name] = next((router for router in candidates if router is not None), None)

    return asked


def _explain(
    call: _Seen,
    parent: torch.nn.Module,
    index: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
) -> WatchedRouter | None:
    """Return the router if this call's output explains what the experts were asked."""
    outputs = call.output if isinstance(call.output, tuple | list) else (call.output,)
    for place, part in enumerate(outputs):
        if not _is_logits(part, index.shape[0], num_experts):
            continue
        choice = Choice(part.reshape(-1, num_experts), weights, index)
        if _tells_of_the_chosen_only(choice):
            continue
        rule = find_rule(choice, _per_expert(call, parent, num_experts), _groups(call.module))
        if rule is not None:
            position = place if isinstance(call.output, tuple | list) else None
            return WatchedRouter(call.module, position, rule)
    return None


def _is_logits(part: Any, tokens: int, num_experts: int) -> bool:
    return (
        isinstance(part, torch.Tensor)
        and part.is_floating_point()
        and part.dim() > 0
        and part.shape[-1] == num_experts
        and part.numel() == tokens * num_experts
    )


def _tells_of_the_chosen_only(choice: Choice) -> bool:
    """Say whether the experts that were not chosen all have one value, so that there is no next best."""
    chosen = torch.zeros_like(choice.logits, dtype=torch.bool).scatter_(1, choice.index, True)
    others = choice.logits[~chosen].reshape(len(chosen), -1)
    return others.shape[1] > 1 and bool((others == others[:, :1]).all())


def _per_expert(call: _Seen, parent: torch.nn.Module, num_experts: int) -> list[torch.Tensor]:
    """Return the tensors with one value per expert that the router holds, is given, or finds in its parent."""
    held = [*call.module.parameters(), *call.module.buffers()]
    beside = [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]
    given = [argument for argument in call.arguments if isinstance(argument, torch.Tensor)]
    found: list[torch.Tensor] = []
    for tensor in (*held, *beside, *given):
        if tensor.is_floating_point() and tensor.numel() == num_experts and not any(tensor is one for one in found):
            found.append(tensor)
    return found


def _groups(router: torch.nn.Module) -> tuple[int, int] | None:
    count = getattr(router, "num_group", None) or getattr(router, "n_group", None)
    kept = getattr(router, "topk_group", None)
    return (count, kept) if isinstance(count, int) and isinstance(kept, int) else None
