"""Tying the experts of a stock model to an engine: layer handles, router logits, and refusals of what cannot work.

Nothing but the model's modules is changed, so another model in the process does not notice.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from emoe_core.checkpoint.adapters import adapter_of
from emoe_core.checkpoint.index import CheckpointIndex
from emoe_core.errors import IntegrationError
from emoe_core.experts import layer as experts
from emoe_core.experts.compute import Proof, prove
from emoe_core.experts.router import watch_routers
from emoe_core.loader.loader import ExpertLoader
from emoe_core.loader.prefetch import Lookahead

# The norm between attention and the MoE block, as the families of transformers call it.
NORM = "post_attention_layernorm"


@dataclass(frozen=True)
class Attached:
    """What tying a model to an engine has shown.

    Attributes
    ----------
    handles : list of LayerHandle
        In layer order.
    eager_because : str or None
        Why some layer is computed by the family's eager code and not in a form proven equal to it; None if none is.
    exact_only : str or None
        Why tokens cannot be rerouted: the router of some layer follows no known rule.
    cache : Any
        What a pass over a few tokens returned as its cache; None where it returned none.
    """

    handles: list[experts.LayerHandle]
    eager_because: str | None
    exact_only: str | None
    cache: Any


def attach_layers(
    model: PreTrainedModel, index: CheckpointIndex, loader: ExpertLoader, session: experts.Session
) -> Attached:
    """Let a model's MoE layers compute from slots."""
    handles = []
    proofs: dict[Any, Proof] = {}
    for layer in index.layers:
        module = model.get_submodule(layer.name)
        handle = experts.LayerHandle(layer.index, module, loader, session)
        kind = (type(module), layer.params, layer.num_experts)
        if kind not in proofs:
            eager = partial(handle.eager, module)
            proofs[kind] = prove(module, eager, loader.memory.samples(layer.index), layer.num_experts)
        form = proofs[kind].form
        handle.form = None if form is None else form.for_module(module)
        experts.attach(module, handle)
        adapter = adapter_of(module)
        if adapter is not None:
            adapter.install(model.get_submodule(layer.name.rpartition(".")[0]), module, experts.emoe_experts_forward)
        handles.append(handle)
    layers = {layer.name: handle for layer, handle in zip(index.layers, handles, strict=True)}
    watched = watch_routers(model, layers)
    for name, router in watched.routers.items():
        layers[name].reads_text = True
        if router is not None:
            layers[name].attach_router(router)
    unexplained = next((name for name, router in watched.routers.items() if router is None), None)
    exact_only = None if unexplained is None else f"no known routing rule explains the router of {unexplained}"
    if watched.failure is not None:
        exact_only = f"its routers could not be watched ({watched.failure})"
    return Attached(
        handles,
        next((proof.failure for proof in proofs.values() if proof.form is None), None),
        exact_only,
        watched.cache,
    )


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
            raise IntegrationError(experts.INFERENCE_ONLY)
        with torch.no_grad():
            return forward(whole(), *args, **kwargs)

    infer.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    model.forward = infer


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
