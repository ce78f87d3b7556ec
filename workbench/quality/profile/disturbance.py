"""Wrong routing on purpose: make the routers of chosen MoE layers choose at random.

A disturbed router keeps its weights and gives them to distinct experts drawn uniformly, for every token, prompt tokens
included. `layer_divergences` disturbs one layer at a time; the layers before it are not computed again, since their
output is that of the undisturbed pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import emoe_core
from emoe_core.errors import OptionError
from emoe_core.experts.layer import router_of
from workbench.quality.token_quality import compare
from workbench.replay.scoring import score


@contextmanager
def random_routing(engine: emoe_core.Engine, layers: Sequence[int], seed: int = 0) -> Iterator[None]:
    """Make the routers of the given MoE layers choose distinct experts at random while the context lasts.

    Raises
    ------
    OptionError
        When a layer's router is not known, so that it cannot be disturbed.
    """
    generator = torch.Generator().manual_seed(seed)
    hooks: list[Any] = []
    try:
        for number in layers:
            layer = engine.index.layers[number]
            router = router_of(engine.model.get_submodule(layer.name))
            if router is None:
                raise OptionError(
                    f"{engine.index.model_type} cannot be disturbed: the router of {layer.name} is unknown"
                )
            hooks.append(router.register_forward_hook(_scrambler(layer.num_experts, generator)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _scrambler(experts: int, generator: torch.Generator) -> Callable[..., Any]:
    def scramble(module: torch.nn.Module, args: Any, output: Any) -> Any:
        place = next(i for i, part in enumerate(output) if not part.is_floating_point())
        index = output[place]
        drawn = torch.rand(index.shape[0], experts, generator=generator).topk(index.shape[1], dim=-1).indices
        return (*output[:place], drawn.to(index.device), *output[place + 1 :])

    return scramble


def layer_divergences(
    engine: emoe_core.Engine,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> list[float]:
    """Return, per MoE layer, the divergence of the output when that layer alone is routed at random.

    Parameters
    ----------
    engine : Engine
        With every expert resident.
    prompt_ids, token_ids : sequences of int
        A prompt and its undisturbed continuation of n tokens, which is scored by teacher forcing.
    progress : callable, optional
        Called after every layer.

    Returns
    -------
    list of float, length = MoE layers
        Mean over the n tokens of KL(undisturbed || disturbed), in nats.
    """
    blocks = [engine.model.get_submodule(_block_name(layer.name)) for layer in engine.index.layers]
    tokens = torch.tensor(token_ids, dtype=torch.long)
    pair = (prompt_ids, token_ids)
    outputs: list[Any] = []
    hooks = [block.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for block in blocks]
    try:
        undisturbed = score(engine, [pair])[0].logits
    finally:
        for hook in hooks:
            hook.remove()
    divergences = []
    for layer in range(len(blocks)):
        with _replayed(blocks[:layer], outputs), random_routing(engine, [layer], seed):
            disturbed = score(engine, [pair])[0].logits
        divergences.append(float(compare(undisturbed, disturbed, tokens).kl_nats.mean()))
        if progress is not None:
            progress()
    return divergences


@contextmanager
def _replayed(blocks: Sequence[torch.nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Make modules return given outputs instead of computing."""
    try:
        for block, output in zip(blocks, outputs, strict=False):
            block.forward = lambda *args, output=output, **kwargs: output
        yield
    finally:
        for block in blocks:
            # What was set on the instance hid the class's own method.
            block.__dict__.pop("forward", None)


def _block_name(experts_name: str) -> str:
    """Return the name of the decoder block that holds an experts module: up to the last number in its path."""
    parts = experts_name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1])
