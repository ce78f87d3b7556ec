"""Tying the experts of a stock model to an engine: layer handles, router logits, and refusals of what cannot work.

Nothing but the model's modules is changed, so another model in the process does not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from . import experts
from .checkpoint import CheckpointIndex
from .errors import IntegrationError
from .expert_compute import ExpertForm, prove
from .loader import ExpertLoader
from .lookahead import Lookahead
from .router_watch import watch_routers
from .undecorated import adapter_of

# The norm between attention and the MoE block, as the families of transformers call it.
NORM = "post_attention_layernorm"


def attach_layers(
    model: PreTrainedModel, index: CheckpointIndex, loader: ExpertLoader, session: experts.Session
) -> list[experts.LayerHandle]:
    """Let a model's MoE layers compute from slots; return their handles, in layer order.

    A handle whose ``explained`` is False has a router that no known routing rule explains: it is served exactly only.
    """
    handles = []
    forms: dict[Any, ExpertForm | None] = {}
    for layer in index.layers:
        module = model.get_submodule(layer.name)
        handle = experts.LayerHandle(layer.index, module, loader, session)
        kind = (type(module), layer.params, layer.num_experts)
        if kind not in forms:
            eager = partial(handle.eager, module)
            forms[kind] = prove(module, eager, loader.memory.samples(layer.index), layer.num_experts)
        form = forms[kind]
        handle.form = None if form is None else form.for_module(module)
        experts.attach(module, handle)
        adapter = adapter_of(module)
        if adapter is not None:
            adapter.install(model.get_submodule(layer.name.rpartition(".")[0]), module, experts.emoe_experts_forward)
        handles.append(handle)
    layers = {layer.name: handle for layer, handle in zip(index.layers, handles, strict=True)}
    for name, router in watch_routers(model, layers).items():
        layers[name].explained = router is not None
        if router is not None:
            layers[name].attach_router(router)
    return handles


def attach_lookahead(
    model: PreTrainedModel, index: CheckpointIndex, handles: Sequence[experts.LayerHandle], distance: int
) -> Lookahead:
    """Let each layer fetch what the layer ``distance`` MoE layers further on is guessed to want; return the guesser."""
    norms = []
    for layer in index.layers:
        # The decoder layer holds the MoE block, which holds the experts.
        norm = getattr(model.get_submodule(layer.name.rsplit(".", 2)[0]), NORM, None)
        norms.append(norm if isinstance(norm, torch.nn.Module) else None)
    lookahead = Lookahead(handles[0].loader, [handle.choose for handle in handles], norms, distance)
    for handle in handles:
        handle.lookahead = lookahead
    return lookahead


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
