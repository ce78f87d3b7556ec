"""Computes the recipe layer by layer: carve, fit the router, repair what was lost. No step needs an optimiser.

Fitting text passes through the dense parent once, and every layer is carved and repaired for the inputs that it gets
there: its target is the dense feed-forward's output, and the down projections that come closest are had in closed form
(ridge regression toward the parent's). A token's squared distance counts over the squared length of the residual stream
after the layer, because a norm follows. The blocks of text are spread over each domain's whole fitting side. No other
text is read, and no loss of the language model is used: the dense parent is the only teacher.

Every random choice follows from the seed and the layer, and finished layers are kept, so a run stopped anywhere goes on
to the same bits (same machine, same number of threads).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaForCausalLM

from emoe_core.errors import OptionError
from emoe_core.files import whole_file
from recipes import corpora
from recipes.carving import Shape, carve, contributions, router_start
from workbench.models.reference import dense
from workbench.models.reference.carved.layer import assemble, factors, pack
from workbench.models.reference.carved.recipe import Recipe

# Tokens that pass through a feed-forward at a time.
PIECE_TOKENS = 2048
Dense = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """How much text, and how far to repair.

    Attributes
    ----------
    block_tokens, blocks : int
        Length of a block of text, and blocks of every domain.
    cluster_tokens : int
        Tokens on which neurons are clustered.
    spread : float
        Standard deviation of router logits over experts. Small: the chosen experts weigh nearly the same.
    ridge : float
        Weight that holds the down projections at the parent's, relative to the mean energy of a neuron; 0: no repair.
    repairable : float
        Largest mean relative loss of a carved layer that is repaired. Above it a few tokens decide: the parent writes
        or erases their massive activations there, and a repair led by these breaks the layer for all others.
    """

    block_tokens: int = 128
    blocks: int = 40
    cluster_tokens: int = 4096
    spread: float = 0.05
    ridge: float = 0.3
    repairable: float = 0.1

    def __post_init__(self) -> None:
        for name in ("block_tokens", "blocks", "cluster_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} of a carving plan is at least 1, not {getattr(self, name)}")


class Carver:
    """Carves one dense model; keeps every finished layer in a folder so that a run can be resumed.

    Parameters
    ----------
    model : LlamaForCausalLM
        The dense parent in float32.
    ids : Tensor, shape [blocks, tokens]
        Fitting text.
    shape : Shape
    plan : Plan
    seed : int
    folder : Path
        Where finished layers are kept.
    """

    def __init__(self, model: LlamaForCausalLM, ids: Tensor, shape: Shape, plan: Plan, seed: int, folder: Path) -> None:
        self.model, self.ids, self.shape, self.plan, self.seed, self.folder = model, ids, shape, plan, seed, folder
        self.finished: list[dict[str, Tensor]] = []
        self.losses: list[dict[str, float]] = []
        self.seconds = 0.0

    @torch.no_grad()
    def run(self, stop_after: int | None = None) -> bool:
        """Carve to the last layer; return whether it was reached.

        Parameters
        ----------
        stop_after : int, optional
            Stop after this many layers of this call that were not finished before.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.finished, self.losses, self.seconds = [], [], 0.0
        body: Any = self.model.model
        stream = body.embed_tokens(self.ids)
        rotary = body.rotary_emb(stream, torch.arange(self.ids.shape[1])[None])
        done = 0
        for index, layer in enumerate(tqdm(body.layers, desc="carve", unit="layer")):
            started = time.monotonic()
            stream = _attend(layer, stream, rotary)
            x = layer.post_attention_layernorm(stream).flatten(0, 1)
            goal = _each(layer.mlp, x)
            stream = stream + goal.view_as(stream)
            matrices = tuple(getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
            path = self.folder / f"layer-{index:02d}.pt"
            if not path.exists():
                if done == stop_after:
                    return False
                done += 1
                parts, losses = self._fit(matrices, x, goal, stream.flatten(0, 1).square().sum(dim=1), index)
                state = {**self._identity(), "parts": parts, "losses": losses, "seconds": time.monotonic() - started}
                with whole_file(path) as scratch:
                    torch.save(state, scratch)
            self._restore(path)
        return True

    def _fit(
        self, matrices: Dense, x: Tensor, goal: Tensor, length: Tensor, index: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return one layer's parts, and its mean relative loss before and after the repair.

        `x` and `goal` are [tokens, hidden]; a token's squared distance counts over its `length` [tokens].
        """
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        gate, up, down = matrices

        def hidden(x: Tensor) -> Tensor:
            return functional.silu(functional.linear(x, gate)) * functional.linear(x, up)

        sample = x[torch.randperm(len(x), generator=generator)[: self.plan.cluster_tokens]]
        order = carve(contributions(hidden(sample), down), self.shape, generator)
        routed = order[self.shape.shared :]

        def energy(x: Tensor) -> Tensor:
            squares = contributions(hidden(x)[:, routed], down[:, routed]).square()
            return squares.unflatten(1, (self.shape.experts, -1)).sum(dim=2)

        parts = {"order": order.to(torch.int32), "router": router_start(x, _each(energy, x), self.plan.spread)}
        parts["router"] = parts["router"].to(torch.bfloat16)
        plain = assemble(self.shape, matrices, parts)
        losses = {"carved": float(((_each(plain, x) - goal).square().sum(dim=1) / length).mean())}
        if self.plan.ridge and losses["carved"] <= self.plan.repairable:
            gram, product = torch.zeros(len(order), len(order)), torch.zeros(len(order), len(down))
            scale = factors(self.shape, len(order))
            for piece in torch.arange(len(x)).split(PIECE_TOKENS):
                weighed = plain.weigh(x[piece]) * scale
                left = goal[piece] - functional.linear(weighed, plain.down / scale)
                scaled = weighed / length[piece, None]
                gram += scaled.T @ weighed
                product += scaled.T @ left
            gram += self.plan.ridge * gram.diagonal().mean() * torch.eye(len(order))
            parts |= pack(torch.linalg.solve(gram, product).T)
            repaired = assemble(self.shape, matrices, parts)
            losses["repaired"] = float(((_each(repaired, x) - goal).square().sum(dim=1) / length).mean())
        return parts, losses

    def _identity(self) -> dict[str, Any]:
        return {"plan": asdict(self.plan), "shape": asdict(self.shape), "seed": self.seed}

    def _restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        known = self._identity()
        if {name: state[name] for name in known} != known:
            raise OptionError(
                f"{path} belongs to another plan, shape or seed. Give those it was started with, or another folder."
            )
        self.finished.append(state["parts"])
        self.losses.append(state["losses"])
        self.seconds += state["seconds"]


def _each(compute: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
    """Apply to a few tokens [tokens, hidden] at a time, or blocks [blocks, tokens, hidden]: memory stays small."""
    return torch.cat([compute(part) for part in stream.split(PIECE_TOKENS if stream.dim() == 2 else 4)])


def _attend(layer: Any, stream: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return the residual stream after the attention of one layer; blocks are whole, so the mask is causal only."""

    def attention(part: Tensor) -> Tensor:
        normed = layer.input_layernorm(part)
        return layer.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=None)[0]

    return stream + _each(attention, stream)


def spread_blocks(ids: Tensor, length: int, count: int) -> Tensor:
    """Return `count` blocks [count, length] at even distances from token ids [tokens]."""
    whole = ids[: len(ids) // length * length].view(-1, length)
    return whole[torch.arange(count) * len(whole) // count]


def train(
    out: Path | str, seed: int = 0, shape: Shape | None = None, plan: Plan | None = None, threads: int = 1
) -> Path:
    """Compute a recipe from the packages and write it to a folder; goes on where it stopped.

    Parameters
    ----------
    out : Path or str
        Folder of the recipe; finished layers lie in its subfolder ``state``, which can be deleted afterwards.
    seed : int
        Seed of the split, the clusters' start and the order of the text.
    shape : Shape, optional
    plan : Plan, optional
    threads : int
        Threads of torch; another number gives other roundings and so other bits.
    """
    shape, plan = shape or Shape(), plan or Plan()
    torch.set_num_threads(threads)
    folder = Path(out)
    source = dense.DenseSource.open(dense.fetch_gguf())
    tokenizer = source.tokenizer()
    splits = [corpora.split(d, tokenizer, seed) for d in tqdm(corpora.DOMAINS, desc="text", unit="domain")]
    ids = torch.cat([spread_blocks(split.fit, plan.block_tokens, plan.blocks) for split in splits])
    carver = Carver(source.model(), ids, shape, plan, seed, folder / "state")
    carver.run()
    description = {
        "parent": {"package": f"{dense.PACKAGE}=={dense.VERSION}", "gguf_sha256": dense.GGUF_SHA256},
        "seed": seed,
        "plan": asdict(plan),
        "domains": corpora.describe(splits),
        "training": {
            "tokens": ids.numel(),
            "seconds": round(carver.seconds),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "losses": [{name: float(f"{value:.4g}") for name, value in layer.items()} for layer in carver.losses],
        },
    }
    return Recipe.save(folder, carver.finished, asdict(shape), description).folder
