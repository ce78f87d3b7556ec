"""Families whose experts do not go through transformers' experts interface, and what lets slots serve them.

An *adapter* knows one experts class: which of its parameters have an expert axis, and the class's own arithmetic over
an object that answers ``<param>[expert]`` from slots, operation by operation as transformers has it, so that results
stay bit-identical. It is installed on the loaded model's modules only (as their ``forward``); the classes stay as
they are. Everything else (misses, rerouting, counters) is that of decorated families.

A family without an adapter is refused by name at load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Eager = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(view of the experts module, hidden [T, H], index [T, k], weights [T, k]) -> [T, H]"""
Serve = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """How one undecorated experts class is served.

    Attributes
    ----------
    params : callable
        Experts module to its parameters, each shaped ``[num_experts, ...]``, by their names within the module.
    eager : callable or None
        The class's arithmetic (see `Eager`); None if its own ``forward`` is that.
    install : callable
        Takes the MoE block, its experts module and `Serve`, and lets the block ask that function.
    """

    params: Callable[[Any], dict[str, torch.Tensor]]
    eager: Eager | None
    install: Callable[[Any, Any, Serve], None]


def adapter_of(module: torch.nn.Module) -> Adapter | None:
    """Return the adapter of an experts module, or None."""
    return ADAPTERS.get(type(module).__name__)


def _own_params(experts: Any) -> dict[str, torch.Tensor]:
    return dict(experts.named_parameters(recurse=False))


def _install(block: Any, experts: Any, serve: Serve) -> None:
    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return serve(experts, hidden.reshape(-1, hidden.shape[-1]), index, weights).view(hidden.shape)

    experts.forward = forward


def _llama4_eager(view: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute as ``Llama4TextExperts``: weights scale the input, and all experts see all tokens, at 0 if not theirs."""
    scores = weights.new_zeros(hidden.shape[0], view.num_experts).scatter_(1, index, weights)
    # Experts that no token chose give zeros, which the sum over all experts needs in their place.
    out = hidden.new_zeros(view.num_experts, *hidden.shape)
    for expert in index.unique().tolist():
        routed = (hidden * scores[:, expert].reshape(-1, 1)).unsqueeze(0)
        gate, up = torch.bmm(routed, view.gate_up_proj[expert].unsqueeze(0)).chunk(2, dim=-1)
        out[expert] = torch.bmm(up * view.act_fn(gate), view.down_proj[expert].unsqueeze(0))[0]
    return out.sum(dim=0)


def _llama4_install(block: Any, experts: Any, serve: Serve) -> None:
    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden_states.reshape(-1, block.hidden_dim)
        scores, logits = block.router(hidden)
        weights, index = scores.topk(block.top_k, dim=1)
        out = block.shared_expert(hidden)
        out.add_(serve(experts, hidden, index, weights))
        return out, logits

    block.forward = forward


def _dbrx_params(experts: Any) -> dict[str, torch.Tensor]:
    shape = (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
    return {f"mlp.{name}": parameter.view(shape) for name, parameter in experts.mlp.named_parameters(recurse=False)}


def _dbrx_eager(view: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute as ``DbrxExperts``."""
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        place, token = torch.where((index == expert).T)
        w1, v1, w2 = (getattr(view, f"mlp.{name}")[expert] for name in ("w1", "v1", "w2"))
        states = view.mlp(hidden[token], w1, v1, w2) * weights[token, place, None]
        out.index_add_(0, token, states)
    return out


def _jetmoe_params(experts: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": getattr(experts, name).weight for name in ("input_linear", "output_linear")}


def _jetmoe_eager(view: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute as ``JetMoeMoE`` without its bias: rows sorted by expert, and added up in that order."""
    chosen = index.flatten()
    order = chosen.sort(0).indices
    token = order.div(index.shape[1], rounding_mode="trunc")
    sizes = torch.bincount(chosen, minlength=view.num_experts).tolist()
    outputs = []
    for expert, rows in enumerate(hidden[token].split(sizes, dim=0)):
        if len(rows):
            first = torch.nn.functional.linear(rows, getattr(view, "input_linear.weight")[expert]).chunk(2, dim=-1)
            inner = view.activation(first[0]) * first[1]
            outputs.append(torch.nn.functional.linear(inner, getattr(view, "output_linear.weight")[expert]))
    weighted = torch.cat(outputs, dim=0) * weights.flatten()[order][:, None]
    return torch.zeros_like(hidden).index_add(0, token, weighted)


def _jetmoe_install(block: Any, experts: Any, serve: Serve) -> None:
    # The experts of its attention stay with the dense weights: they are asked twice in a layer, with attention between.
    experts.num_experts = experts.router.num_experts

    def forward(layer_input: torch.Tensor) -> torch.Tensor:
        hidden = layer_input.reshape(-1, layer_input.shape[-1])
        logits = experts.router(hidden)[-1]
        best, index = logits.topk(experts.router.top_k, dim=1)
        weights = torch.softmax(best, dim=1).type_as(hidden)
        return serve(experts, hidden, index, weights).view(layer_input.shape) + experts.bias

    experts.forward = forward


ADAPTERS: Mapping[str, Adapter] = {
    "DbrxExperts": Adapter(_dbrx_params, _dbrx_eager, _install),
    "JetMoeMoE": Adapter(_jetmoe_params, _jetmoe_eager, _jetmoe_install),
    "Llama4TextExperts": Adapter(_own_params, _llama4_eager, _llama4_install),
    "Step3p7Experts": Adapter(_own_params, None, _install),
}
