"""Tying the experts of a stock model to an engine: layer handles, router logits, and refusals of what cannot work.

Nothing but the model's modules is changed, so another model in the process does not notice.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from emoe_core.checkpoint.adapters import adapter_of
from emoe_core.checkpoint.index import CheckpointIndex
from emoe_core.errors import IntegrationError
from emoe_core.experts.compute import FoundForm, find_form
from emoe_core.experts.dispatch import attach, emoe_experts_forward
from emoe_core.experts.eager import EagerForm
from emoe_core.experts.layer import INFERENCE_ONLY, Form, LayerHandle, Session
from emoe_core.experts.router import watch_routers
from emoe_core.loader.loader import ExpertLoader


@dataclass(frozen=True)
class Attached:
    """What tying a model to an engine has shown.

    Attributes
    ----------
    eager_because : str or None
        Why some layer is computed by the family's eager code and not in a form proven equal to it; None if none is.
    exact_only : str or None
        Why tokens cannot be rerouted: the router of some layer follows no known rule.
    cache : Any
        What a pass over a few tokens returned as its cache; None where it returned none.
    """

    eager_because: str | None
    exact_only: str | None
    cache: Any


def attach_layers(model: PreTrainedModel, index: CheckpointIndex, loader: ExpertLoader, session: Session) -> Attached:
    """Let a model's MoE layers compute from slots.

    Forms first, then one pass that shows the routers, then each layer's handle, whole.
    """
    modules = {layer.name: model.get_submodule(layer.name) for layer in index.layers}
    forms, eager_because = _forms(index, modules, loader)
    for name, module in modules.items():
        adapter = adapter_of(module)
        if adapter is not None:
            adapter.install(model.get_submodule(name.rpartition(".")[0]), module, emoe_experts_forward)
    watched = watch_routers(model, {layer.name: layer.num_experts for layer in index.layers})
    routers = [watched.routers.get(name) for name in modules]
    for layer, form, router in zip(index.layers, forms, routers, strict=True):
        handle = LayerHandle(layer.index, loader, session, form, router, layer.name in watched.routers)
        attach(modules[layer.name], handle)
    unexplained = next((name for name, router in watched.routers.items() if router is None), None)
    exact_only = None if unexplained is None else f"no known routing rule explains the router of {unexplained}"
    if watched.failure is not None:
        exact_only = f"its routers could not be watched ({watched.failure})"
    return Attached(eager_because, exact_only, watched.cache)


def _forms(
    index: CheckpointIndex, modules: Mapping[str, torch.nn.Module], loader: ExpertLoader
) -> tuple[list[Form], str | None]:
    """Return how each layer is computed, and why one of them by its family's eager code."""
    forms: list[Form] = []
    found: dict[Any, FoundForm] = {}
    for layer in index.layers:
        module = modules[layer.name]
        eager = EagerForm(module, (param.name for param in layer.params))
        kind = (type(module), layer.params, layer.num_experts)
        if kind not in found:
            samples = loader.memory.samples(layer.index)
            # Where slots do not lie as stock's own parameters do, equal bits within slots say too little.
            fresh = loader.device.align_bytes is not None
            found[kind] = find_form(module, eager.layer, samples, layer.num_experts, fresh)
        form = found[kind].form
        forms.append(eager if form is None else form.for_module(module))
    return forms, next((one.failure for one in found.values() if one.form is None), None)


def infer_only(model: PreTrainedModel) -> None:
    """Let a model's passes record no gradients.

    Its parameters go on asking for them as stock's do: torch computes some products in another order, and rounds
    otherwise, for parameters that do not.
    """
    whole, forward = weakref.ref(model), type(model).forward

    @wraps(forward)
    def infer(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if torch.is_grad_enabled() and any(isinstance(one, torch.Tensor) and one.requires_grad for one in given):
            raise IntegrationError(INFERENCE_ONLY)
        with torch.no_grad():
            return forward(whole(), *args, **kwargs)

    infer.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    model.forward = infer
    if model.can_generate():
        # Where its cache is static, generate would compile the pass (on CUDA only), and with it the loading of experts.
        model.generation_config.disable_compile = True


def refuse_misuse(model: PreTrainedModel) -> None:
    """Let methods that cannot work without the experts' weights say so."""
    for name, reason in _REFUSED.items():
        setattr(model, name, _refuse(f"{name}: {reason}"))


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
