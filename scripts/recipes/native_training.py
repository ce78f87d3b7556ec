"""Trains the native model from scratch: a tokenizer, then every weight, routers included, on the text of `corpora`.

Blocks of tokens are drawn without replacement, epoch by epoch. The learning rate rises, stays, and falls at last to a
tenth, on longer sequences: a model reads positions that it was trained at, and prompts are longer than what trains
fastest. The plan says for how many steps the rate stays, or a file called ``decay`` beside the state, which lets it
fall from where the training is, over as many steps as the file says (none: the plan's). A file called ``stop`` ends
the run after the step at hand, its state saved. Every random choice follows from the seed and the step, so a run
stopped anywhere goes on from its last saved state.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from emoe_core.errors import OptionError
from emoe_core.files import whole_file
from recipes import corpora
from workbench.fetch import cache_dir, sha256_file
from workbench.models.reference import dense
from workbench.models.reference.native.recipe import (
    SPECIAL,
    TOKENIZER,
    Recipe,
    Shape,
    stored,
)

STATE, LOG, DECAY, STOP = "state.pt", "log.jsonl", "decay", "stop"
SAVE_EVERY_S = 300
LIMIT_CHARACTERS = 3_000_000


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes
    ----------
    steps, decay_steps : int
        Steps until the learning rate falls, and while it does.
    batch, length : int
        Sequences a step, and their tokens, until the learning rate falls.
    decay_length : int
        Tokens of a sequence while it falls; a step has as many tokens as before.
    rate : float
        Peak learning rate of AdamW.
    warmup_steps : int
    balance : float
        Weight of `balance_loss`.
    look_every : int
        Steps between looks at held-out text.
    """

    steps: int = 20_000
    decay_steps: int = 500
    batch: int = 8
    length: int = 256
    decay_length: int = 1024
    rate: float = 2e-3
    warmup_steps: int = 100
    balance: float = 0.01
    look_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "decay_steps", "batch", "length", "decay_length", "warmup_steps", "look_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} of a training plan is at least 1, not {getattr(self, name)}")

    def rate_at(self, step: int, stable: int, decay_steps: int) -> float:
        """Return the learning rate of a step, when it falls for ``decay_steps`` from step ``stable`` on."""
        if step < self.warmup_steps:
            return self.rate * (step + 1) / self.warmup_steps
        fallen = min(1.0, max(0.0, (step - stable) / decay_steps))
        return self.rate * (1 - 0.9 * fallen)


def make_tokenizer(texts: list[str], shape: Shape) -> Tokenizer:
    """Return byte-level BPE trained on some texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encoded(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Return token ids of texts, each after the token that ends the one before, uint16."""
    parts = [np.array([0, *encoding.ids], np.uint16) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(parts)


class Trainer:
    """Trains one model; holds the position so that a run can be resumed."""

    def __init__(
        self, tokens: np.ndarray, held_out: dict[str, Tensor], shape: Shape, plan: Plan, seed: int, folder: Path
    ):
        torch.manual_seed(seed)
        self.tokens, self.held_out, self.shape = tokens, held_out, shape
        self.plan, self.seed, self.folder = plan, seed, folder
        config = shape.config()
        config.router_aux_loss_coef = 0.0
        self.model = OlmoeForCausalLM(config)
        self.model.set_experts_implementation("grouped_mm")
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        self.step, self.stable, self.decay_steps, self.seconds = 0, plan.steps, plan.decay_steps, 0.0

    def batch(self, step: int) -> Tensor:
        """Return the token ids [sequences, length] of a step."""
        plan = self.plan
        if step < self.stable:
            return self._blocks(step, plan.batch, plan.length, phase=0)
        sequences = max(1, plan.batch * plan.length // plan.decay_length)
        return self._blocks(step - self.stable, sequences, plan.decay_length, phase=1)

    def _blocks(self, step: int, sequences: int, length: int, phase: int) -> Tensor:
        """Return the blocks of a phase's step; each comes once in an epoch."""
        whole, ids = (len(self.tokens) - 1) // length, []
        for place in range(step * sequences, (step + 1) * sequences):
            epoch, index = divmod(place, whole)
            order = np.random.default_rng((self.seed, phase, epoch)).permutation(whole)
            start = int(order[index]) * length
            ids.append(self.tokens[start : start + length].astype(np.int64))
        return torch.from_numpy(np.stack(ids))

    def run(self, stop_after: int | None = None) -> bool:
        """Train to the end of the plan, or for some steps of this call; return whether the end was reached."""
        self.resume()
        began, saved = self.step, time.monotonic()
        bar = tqdm(total=self.stable + self.decay_steps, initial=self.step, unit="step", mininterval=5)
        while self.step < self.stable + self.decay_steps:
            stop = (self.folder / STOP).exists() or (stop_after is not None and self.step - began >= stop_after)
            if stop:
                self.save()
                return False
            if self.step < self.stable and (self.folder / DECAY).exists():
                self.stable = self.step
                self.decay_steps = int((self.folder / DECAY).read_text() or self.plan.decay_steps)
                bar.total = self.stable + self.decay_steps
            started = time.perf_counter()
            loss = self.one_step()
            self.seconds += time.perf_counter() - started
            self.step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
            if self.step % self.plan.look_every == 0:
                self.look(loss)
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
        if self.step > began and self.step % self.plan.look_every:
            self.look(loss)
        self.save()
        return True

    def one_step(self) -> float:
        """Take a step of the optimiser and return the language-model loss in nats a token."""
        self.model.train()
        ids = self.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step, self.stable, self.decay_steps)
        output = self.model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        self.optimizer.zero_grad(set_to_none=True)
        balance = balance_loss(output.router_logits, self.shape.top_k)
        (output.loss + self.plan.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(output.loss.detach())

    @torch.no_grad()
    def look(self, loss: float) -> None:
        """Write a line of the log: loss, held-out loss by domain, load of the experts."""
        self.model.eval()
        losses, loads = {}, []
        for name, ids in self.held_out.items():
            output = self.model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
            losses[name] = round(float(output.loss), 4)
            chosen = torch.stack([layer.topk(self.shape.top_k).indices.flatten() for layer in output.router_logits])
            loads.append(torch.nn.functional.one_hot(chosen, self.shape.experts).sum(dim=1))
        load = torch.stack(loads).sum(dim=0).float()
        least = load.min(dim=1).values / load.mean(dim=1)
        line = {
            "step": self.step,
            "tokens": self.step * self.plan.batch * self.plan.length,
            "seconds": round(self.seconds),
            "loss": round(loss, 4),
            "held_out": losses,
            "mean_held_out": round(sum(losses.values()) / len(losses), 4),
            "least_load": round(float(least.min()), 3),
            "most_load": round(float((load.max(dim=1).values / load.mean(dim=1)).max()), 3),
        }
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write everything that a resumed run needs."""
        state = {
            "plan": asdict(self.plan),
            "seed": self.seed,
            "step": self.step,
            "stable": self.stable,
            "decay_steps": self.decay_steps,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with whole_file(self.folder / STATE) as scratch:
            torch.save(state, scratch)

    def resume(self) -> None:
        """Go on from the saved state, if there is one of this plan and seed."""
        file = self.folder / STATE
        if not file.exists():
            return
        state: dict[str, Any] = torch.load(file, weights_only=True)
        if (state["plan"], state["seed"]) != (asdict(self.plan), self.seed):
            raise OptionError(f"{file} belongs to another plan or seed; name another folder or delete it.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.stable, self.decay_steps = state["step"], state["stable"], state["decay_steps"]
        self.seconds = state["seconds"]


def balance_loss(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Return the load-balancing loss of OLMoE (arXiv 2409.02060, section 2), the mean over layers; 1 is even.

    transformers' own takes the tokens of all layers together, where a layer's idle experts are made up for by another
    layer's: a router may then settle on a few (here it did: one layer gave an expert 7.5 times its even share).

    Parameters
    ----------
    logits : sequence of Tensor, shape [tokens, experts]
        Of every layer's router.
    top_k : int
    """
    losses = []
    for layer in logits:
        shares = layer.float().softmax(dim=-1)
        chosen = shares.topk(top_k).indices.flatten()
        load = torch.bincount(chosen, minlength=layer.shape[-1]) / len(chosen)
        losses.append(layer.shape[-1] * (load * shares.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def train(out: Path, seed: int = 0, plan: Plan | None = None, shape: Shape | None = None) -> Path:
    """Train to the end and write the recipe; the state lies in the cache, so that the same call goes on.

    Raises
    ------
    OptionError
        When a file called ``stop`` ended it before, or the state is of another plan or seed.
    """
    plan, shape = plan or Plan(), shape or Shape()
    work = cache_dir() / "training" / f"native-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    counting = dense.DenseSource.open(dense.fetch_gguf()).tokenizer()
    texts = [
        corpora.split_texts(domain, counting, seed, limit_characters=LIMIT_CHARACTERS) for domain in corpora.DOMAINS
    ]
    fit = [text for part in texts for text in part.fit]
    file = work / TOKENIZER
    if not file.exists():
        with whole_file(file) as scratch:
            make_tokenizer(fit, shape).save(str(scratch))
    tokenizer = Tokenizer.from_file(str(file))
    order = np.random.default_rng(seed).permutation(len(fit))
    tokens = encoded([fit[place] for place in order], tokenizer)
    held_out = {}
    for part in texts:
        ids = torch.from_numpy(encoded([text[:8000] for text in part.held_out], tokenizer).astype(np.int64))
        whole = min(len(ids) // plan.length, 8)
        held_out[part.domain] = ids[: whole * plan.length].view(whole, plan.length)
    trainer = Trainer(tokens, held_out, shape, plan, seed, work)
    print(f"{len(tokens):,} tokens to fit on, {sum(p.numel() for p in trainer.model.parameters()):,} parameters")
    if not trainer.run():
        raise OptionError(
            f"training stopped at step {trainer.step} because of {work / STOP}: delete that file, and the same command "
            f"goes on."
        )
    return write_recipe(out, trainer, texts, tokenizer)


def write_recipe(out: Path, trainer: Trainer, texts: list[corpora.Texts], tokenizer: Tokenizer) -> Path:
    """Write the weights in 8 bits, the tokenizer, and what they were made of."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / TOKENIZER))
    state = {name: tensor for name, tensor in trainer.model.state_dict().items() if name != "lm_head.weight"}
    description = {
        "seed": trainer.seed,
        "plan": asdict(trainer.plan),
        "training": {
            "steps": trainer.step,
            "stable_steps": trainer.stable,
            "decay_steps": trainer.decay_steps,
            "tokens": trainer.step * trainer.plan.batch * trainer.plan.length,
            "seconds": round(trainer.seconds),
            "threads": torch.get_num_threads(),
            "last_look": [json.loads(line) for line in (trainer.folder / LOG).read_text().splitlines()][-1:],
        },
        "tokenizer_sha256": sha256_file(out / TOKENIZER),
        "domains": corpora.describe_texts(texts, PreTrainedTokenizerFast(tokenizer_object=tokenizer)),
    }
    Recipe.save_tensors(out, stored(state), asdict(trainer.shape), {"layers": trainer.shape.layers, **description})
    return out
