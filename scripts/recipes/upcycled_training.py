"""Computes the recipe: branch (one adapter per domain), then mix (routers, with the adapters at a lower rate).

Branch: expert d alone carries every token of domain d. Mix: routers start as linear classifiers of the domain at each
layer's router input, then all experts and routers train together on balanced batches, with top-k routing as at
inference, on the language-model loss plus the load-balancing loss.

Every random choice follows from the seed and the step, so a run stopped anywhere goes on to the same bits from its
last saved state (same machine, same number of threads).
"""

from __future__ import annotations

import math
import time
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
from recipes.mixture import BASE, MixtureFeedForward, Shape, adapter_parameters, grow
from workbench.models.reference import dense
from workbench.models.reference.upcycled.recipe import Recipe

STATE = "state.pt"

PARTS = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b", "router")


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes
    ----------
    branch_steps, mix_steps : int
        Optimiser steps per domain, and of the joint phase.
    branch_batch, branch_length, mix_length : int
        Sequences per branch step and their tokens; the mix phase takes one sequence of every domain.
    branch_rate, mix_rate, router_rate : float
        Peak learning rates (warm-up over a tenth of the steps, then cosine to a tenth).
    balance : float
        Weight of the load-balancing loss.
    probe_tokens : int
        Tokens per domain on which the routers' start is fitted.
    save_every : int
        Steps between saved states.
    """

    branch_steps: int = 48
    mix_steps: int = 170
    branch_batch: int = 2
    branch_length: int = 256
    mix_length: int = 128
    branch_rate: float = 3e-3
    mix_rate: float = 1.5e-3
    router_rate: float = 5e-4
    balance: float = 0.01
    probe_tokens: int = 1024
    save_every: int = 20

    def __post_init__(self) -> None:
        for name in ("branch_steps", "branch_batch", "branch_length", "mix_length", "probe_tokens", "save_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} of a training plan is at least 1, not {getattr(self, name)}")


class Trainer:
    """Trains the mixture grown from one dense model; holds the position so that a run can be resumed."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        texts: list[Tensor],
        shape: Shape,
        plan: Plan,
        seed: int,
        folder: Path,
    ) -> None:
        if len(texts) != shape.experts:
            raise OptionError(f"{shape.experts} experts need as many domains, got {len(texts)}")
        self.model, self.texts, self.plan, self.seed, self.folder = model, texts, plan, seed, folder
        self.mixtures: list[MixtureFeedForward] = grow(model, shape, seed)
        self.adapters = adapter_parameters(self.mixtures)
        self.routers = [mixture.router for mixture in self.mixtures]
        self.stage, self.step = 0, 0
        self.losses: list[list[float]] = [[] for _ in range(shape.experts + 1)]
        self.seconds = 0.0
        self.optimizer = self._optimizer()

    @property
    def _stages(self) -> int:
        return len(self.texts) + 1

    @property
    def _mixing(self) -> bool:
        return self.stage == len(self.texts)

    def _optimizer(self) -> torch.optim.Adam:
        groups: list[dict[str, Any]] = [{"params": self.adapters}]
        if self._mixing:
            groups.append({"params": self.routers})
        return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.98))

    def run(self, resume: bool = True, stop_after: int | None = None) -> bool:
        """Train to the end of the plan; return whether the end was reached.

        Parameters
        ----------
        resume : bool
            Go on from the saved state in the folder, if there is one for the same plan and seed.
        stop_after : int, optional
            Save and stop after this many steps of this call.
        """
        if resume:
            self._restore()
        done = 0
        while self.stage < self._stages:
            steps = self.plan.mix_steps if self._mixing else self.plan.branch_steps
            if self._mixing and self.step == 0:
                self._start_routers()
            name = "mix" if self._mixing else f"expert {self.stage}"
            for _ in tqdm(
                range(self.step, steps), desc=name, initial=self.step, total=steps, unit="step", mininterval=5
            ):
                started = time.monotonic()
                self.losses[self.stage].append(self._train_step(steps))
                self.step += 1
                self.seconds += time.monotonic() - started
                done += 1
                if stop_after is not None and done >= stop_after:
                    self._save()
                    return False
                if self.step % self.plan.save_every == 0:
                    self._save()
            self.stage, self.step = self.stage + 1, 0
            self.optimizer = self._optimizer()
            self._save()
        return True

    def _train_step(self, steps: int) -> float:
        plan = self.plan
        share = self.step / max(1, steps)
        rate = min(1.0, (self.step + 1) / max(1.0, steps / 10)) * (0.55 + 0.45 * math.cos(math.pi * share))
        groups = self.optimizer.param_groups
        groups[0]["lr"] = rate * (plan.mix_rate if self._mixing else plan.branch_rate)
        if self._mixing:
            groups[1]["lr"] = rate * plan.router_rate
            blocks = [self._blocks(d, 1, plan.mix_length) for d in range(len(self.texts))]
            ids = torch.cat(blocks)
        else:
            ids = self._blocks(self.stage, plan.branch_batch, plan.branch_length)
        for mixture in self.mixtures:
            mixture.fixed_expert = None if self._mixing else self.stage
        self.optimizer.zero_grad(set_to_none=True)
        loss = next_token_loss(self.model, ids)
        total = loss
        if self._mixing and plan.balance:
            balance = torch.stack([mixture.balance_loss() for mixture in self.mixtures]).mean()
            total = loss + plan.balance * balance
        total.backward()
        torch.nn.utils.clip_grad_norm_([p for p in [*self.adapters, *self.routers] if p.grad is not None], 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def _blocks(self, domain: int, count: int, length: int) -> Tensor:
        """Return the blocks of this step: text cut into blocks, a new seeded order every epoch."""
        text = self.texts[domain]
        blocks = len(text) // length
        # The mix phase reads blocks of another length in another order, from all domains.
        salt = self._stages * 1000 + domain if self._mixing else domain
        rows = []
        for position in range(self.step * count, (self.step + 1) * count):
            generator = torch.Generator().manual_seed(hash((self.seed, salt, position // blocks)) & 0x7FFFFFFF)
            block = int(torch.randperm(blocks, generator=generator)[position % blocks])
            rows.append(text[block * length : (block + 1) * length])
        return torch.stack(rows)

    @torch.no_grad()
    def _start_routers(self) -> None:
        """Set every router to a linear classifier of the domain, fitted on the dense parent's router inputs."""
        inputs: list[list[Tensor]] = [[] for _ in self.mixtures]
        labels = []
        length = min(256, self.plan.branch_length)
        for mixture in self.mixtures:
            mixture.fixed_expert, mixture.keep_inputs = BASE, True
        for domain, text in enumerate(self.texts):
            rows = max(1, min(self.plan.probe_tokens, len(text)) // length)
            ids = text[-rows * length :].view(rows, length)
            self.model.model(input_ids=ids)
            labels.append(torch.full((ids.numel(),), domain))
            for index, mixture in enumerate(self.mixtures):
                assert mixture.inputs is not None
                inputs[index].append(mixture.inputs)
        for mixture in self.mixtures:
            mixture.keep_inputs, mixture.inputs = False, None
        target = torch.cat(labels)
        for mixture, found in zip(tqdm(self.mixtures, desc="routers", unit="layer"), inputs, strict=True):
            mixture.router.copy_(_linear_classifier(torch.cat(found), target, mixture.shape.experts))

    def _save(self) -> None:
        state = {
            "plan": asdict(self.plan),
            "seed": self.seed,
            "stage": self.stage,
            "step": self.step,
            "losses": self.losses,
            "seconds": self.seconds,
            "adapters": [p.detach() for p in self.adapters],
            "routers": [p.detach() for p in self.routers],
            "optimizer": self.optimizer.state_dict(),
        }
        with whole_file(self.folder / STATE) as scratch:
            torch.save(state, scratch)

    @torch.no_grad()
    def _restore(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["plan"] != asdict(self.plan) or state["seed"] != self.seed:
            raise OptionError(
                f"{path} belongs to another plan or seed. Give the plan it was started with, or another folder."
            )
        self.stage, self.step = state["stage"], state["step"]
        self.losses, self.seconds = state["losses"], state["seconds"]
        for parameter, saved in zip(self.adapters + self.routers, state["adapters"] + state["routers"], strict=True):
            parameter.copy_(saved)
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])


def next_token_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of tokens 1.. given those before; `ids` is [sequences, length]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _linear_classifier(inputs: Tensor, target: Tensor, classes: int, steps: int = 80) -> Tensor:
    """Fit multinomial logistic regression without intercept (a Mixtral router has none); return [classes, hidden]."""
    with torch.enable_grad():
        weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.02)
        for _ in range(steps):
            loss = functional.cross_entropy(inputs @ weight.T, target) + 1e-3 * weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weight.detach()


def train(out: Path | str, seed: int = 0, plan: Plan | None = None, resume: bool = True, threads: int = 2) -> Path:
    """Compute a recipe from the packages and write it to a folder; about an hour on two undisturbed cores.

    Parameters
    ----------
    out : Path or str
        Folder of the recipe; the training state lies in its subfolder ``state`` and can be deleted afterwards.
    seed : int
        Seed of the split, the adapters' start and the order of the text.
    plan : Plan, optional
        Steps and rates.
    resume : bool
        Go on from a saved state of the same plan and seed.
    threads : int
        Threads of torch; another number gives other roundings and so other bits.
    """
    plan = plan or Plan()
    torch.set_num_threads(threads)
    folder = Path(out)
    source = dense.DenseSource.open(dense.fetch_gguf())
    tokenizer = source.tokenizer()
    splits = [corpora.split(d, tokenizer, seed) for d in tqdm(corpora.DOMAINS, desc="text", unit="domain")]
    trainer = Trainer(source.model(), [s.fit for s in splits], Shape(), plan, seed, folder / "state")
    trainer.run(resume)
    return describe(trainer, splits, folder).folder


def describe(trainer: Trainer, splits: list[corpora.Split], folder: Path) -> Recipe:
    """Write the trained parameters as a recipe."""
    description = {
        "parent": {"package": f"{dense.PACKAGE}=={dense.VERSION}", "gguf_sha256": dense.GGUF_SHA256},
        "seed": trainer.seed,
        "plan": asdict(trainer.plan),
        "domains": corpora.describe(splits),
        "training": {
            "seconds": round(trainer.seconds),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "losses": [[round(value, 4) for value in losses] for losses in trainer.losses],
        },
    }
    return save_recipe(folder, trainer.mixtures, description)


def save_recipe(folder: Path, mixtures: list[MixtureFeedForward], description: dict[str, Any]) -> Recipe:
    """Write the trained parameters of all layers as a recipe."""
    layers = [{part: getattr(mixture, part) for part in PARTS} for mixture in mixtures]
    return Recipe.save(folder, layers, asdict(mixtures[0].shape), description)
