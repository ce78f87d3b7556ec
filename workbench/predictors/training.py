"""Train the transformer predictor on recorded prompts (paper, section 3.2).

Examples come from made-up streams: prompts of the training split are drawn in a sticky or a uniform order of tasks, and
at every place the history so far is the input, the next prompt's shares are the target. In some streams no task can be
told, so that the network learns to read the task off the stream. Loss: cross-entropy of the predicted against the true
shares, mean over layers.

A part of each task's prompts is held out. Training stops when the loss on streams of those no longer falls, and the
best weights are kept. Training prompts are drawn with replacement (without, a network that knows them by heart could
tell what is still to come); held-out ones occur once a stream, as in reality.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emoe_core.errors import DataError, OptionError
from emoe_core.planning.tasks import UNKNOWN
from emoe_core.predictor.frequency import shares_of
from emoe_core.predictor.history import History
from emoe_core.predictor.network import VARIANTS, NetworkShape, ShareNetwork
from emoe_core.predictor.transformer import PredictorHeader, TransformerPredictor

Progress = Callable[[int, int, float], None]
FEEDBACK_PASSES = 3  # variant L: see ShareNetwork.predict


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes
    ----------
    variant : str
        "A" or "L".
    width, depth, heads : int
        Sizes of the network.
    epochs, patience : int
        Epochs at most, and epochs without a better held-out loss after which to stop.
    streams : int
        Made-up streams per epoch.
    longest : int
        Prompts of the longest stream; lengths are log-uniform, since short histories matter most.
    held_out : float
        Share of each task's prompts to judge by.
    unknown_share : float
        Share of streams whose tasks cannot be told.
    session_length : float
        Mean prompts of a session in sticky streams.
    learning_rate, weight_decay, dropout : float
    seed : int
    """

    variant: str = "A"
    width: int = 64
    depth: int = 2
    heads: int = 4
    epochs: int = 80
    patience: int = 12
    streams: int = 32
    longest: int = 96
    held_out: float = 0.25
    unknown_share: float = 0.3
    session_length: float = 8.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise OptionError(f"unknown variant {self.variant!r} of the trained predictor: choose 'A' or 'L'")
        if self.epochs < 1 or self.patience < 1 or self.streams < 1 or self.longest < 2:
            raise OptionError("epochs, patience and streams must be 1 or more, longest 2 or more")
        if not 0 < self.held_out < 1 or not 0 <= self.unknown_share <= 1:
            raise OptionError("held_out must lie between 0 and 1, unknown_share in [0, 1]")


Example = tuple[str, np.ndarray]


def train(
    prompts: Sequence[Example],
    model_hash: str,
    options: TrainingOptions | None = None,
    progress: Progress | None = None,
) -> TransformerPredictor:
    """Train a predictor.

    Parameters
    ----------
    prompts : sequence of (str, np.ndarray)
        Task and counts [layers, experts] of recorded prompts; at least four of each task.
    model_hash : str
        Content hash of the model that was recorded.
    options : TrainingOptions, optional
    progress : callable, optional
        Called with (epochs done, epochs at most, held-out loss).

    Returns
    -------
    TransformerPredictor
        Without history. Its header's metrics: ``held_out_loss_nats`` and that of the base and of hindsight (the
        entropy), ``epochs``, ``examples``.

    Raises
    ------
    DataError
        When a task has too few prompts.
    """
    options = options or TrainingOptions()
    generator = np.random.default_rng(options.seed)
    training, held_out = _split(prompts, options, generator)
    layers, experts = prompts[0][1].shape
    tasks = tuple(sorted(training))
    shape = NetworkShape(options.variant, layers, experts, tasks, options.width, options.depth, options.heads)
    judged = [
        _examples(_stream(held_out, options, np.random.default_rng([options.seed, place]), replace=False), shape)
        for place in range(24)
    ]
    judge = _Batch.join(judged)
    passes = FEEDBACK_PASSES
    examples = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = ShareNetwork(shape, options.dropout)
        optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
        # An untrained network is the base: a network that learns nothing useful is kept as that.
        base_loss = best_loss = _judge(network, judge, passes)
        best, best_epoch, epoch = _copy(network), 0, 0
        for epoch in range(1, options.epochs + 1):
            network.train()
            streams = (_stream(training, options, generator, replace=True) for _ in range(options.streams))
            epoch_data = _Batch.join([_examples(stream, shape) for stream in streams])
            examples += len(epoch_data)
            for batch in epoch_data.shuffled(generator, 64):
                optimizer.zero_grad()
                batch.loss(network, passes).backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
            loss = _judge(network, judge, passes)
            if loss < best_loss:
                best_loss, best, best_epoch = loss, _copy(network), epoch
            if progress is not None:
                progress(epoch, options.epochs, loss)
            if epoch - best_epoch >= options.patience:
                break
    network.load(best)
    metrics = {
        "held_out_loss_nats": best_loss,
        "base_loss_nats": base_loss,
        "entropy_nats": float(-(judge.target * judge.target.clamp_min(1e-12).log()).sum(-1).mean()),
        "best_epoch": float(best_epoch),
        "epochs": float(epoch),
        "examples": float(examples),
        "prompts": float(len(prompts)),
        "seed": float(options.seed),
    }
    return TransformerPredictor(network, PredictorHeader(model_hash, data_hash(prompts), shape, metrics))


def data_hash(prompts: Sequence[Example]) -> str:
    """Return a SHA-256 over tasks and counts, in order."""
    digest = hashlib.sha256()
    for task, counts in prompts:
        digest.update(task.encode() + b"\0" + np.ascontiguousarray(counts, dtype=np.float64).tobytes())
    return digest.hexdigest()


Pools = dict[str, list[np.ndarray]]


def _split(prompts: Sequence[Example], options: TrainingOptions, generator: np.random.Generator) -> tuple[Pools, Pools]:
    pools: Pools = {}
    for task, counts in prompts:
        if shares_of(counts) is not None:
            pools.setdefault(task, []).append(counts)
    small = {task: len(pool) for task, pool in pools.items() if len(pool) < 4}
    if small or not pools:
        named = ", ".join(f"{task} {count}" for task, count in small.items()) or "none at all"
        raise DataError(f"too few recorded prompts to train a predictor: {named}. Record at least 4 of each task.")
    training: Pools = {}
    held_out: Pools = {}
    for task in sorted(pools):
        order = generator.permutation(len(pools[task]))
        kept = max(1, round(len(order) * options.held_out))
        held_out[task] = [pools[task][place] for place in order[:kept]]
        training[task] = [pools[task][place] for place in order[kept:]]
    return training, held_out


def _stream(pools: Pools, options: TrainingOptions, generator: np.random.Generator, replace: bool) -> list[Example]:
    """Draw a stream: sticky or uniform, tasks known or unknown; without replacement it ends with a task's prompts."""
    names = list(pools)
    length = int(np.exp(generator.uniform(np.log(2), np.log(options.longest + 1))))
    sticky, unknown = generator.random() < 0.5, generator.random() < options.unknown_share
    left = {task: list(generator.permutation(len(pool))) for task, pool in pools.items()}
    task = names[generator.integers(len(names))]
    stream: list[Example] = []
    while len(stream) < length:
        if not sticky or generator.random() < 1.0 / options.session_length:
            task = names[generator.integers(len(names))]
        if not replace and not left[task]:
            break
        place = generator.integers(len(pools[task])) if replace else left[task].pop()
        stream.append((UNKNOWN if unknown else task, pools[task][place]))
    return stream


@dataclass(frozen=True)
class _Batch:
    """Examples as tensors: features [B, L, F], tasks [B], base and target [B, L, E]."""

    features: torch.Tensor
    tasks: torch.Tensor
    base: torch.Tensor
    target: torch.Tensor

    def __len__(self) -> int:
        return len(self.tasks)

    @classmethod
    def join(cls, parts: Sequence[_Batch]) -> _Batch:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def shuffled(self, generator: np.random.Generator, size: int) -> list[_Batch]:
        order = torch.from_numpy(generator.permutation(len(self)))
        return [
            _Batch(self.features[rows], self.tasks[rows], self.base[rows], self.target[rows])
            for rows in order.split(size)
        ]

    def loss(self, network: ShareNetwork, passes: int) -> torch.Tensor:
        logs = network.predict(self.features, self.tasks, self.base, passes)
        return -(self.target * logs).sum(dim=-1).mean()


def _examples(stream: Sequence[Example], shape: NetworkShape) -> _Batch:
    history = History(shape.layers, shape.experts)
    features, tasks, base, target = [], [], [], []
    for task, counts in stream:
        features.append(history.features(task))
        tasks.append(shape.task_index(task))
        base.append(history.base(task))
        target.append(shares_of(counts))
        history.observe(task, counts)
    return _Batch(
        torch.from_numpy(np.stack(features)),
        torch.tensor(tasks),
        torch.from_numpy(np.stack(base)).float(),
        torch.from_numpy(np.stack(target)).float(),  # type: ignore[arg-type]
    )


def _judge(network: ShareNetwork, batch: _Batch, passes: int) -> float:
    network.eval()
    with torch.no_grad():
        return float(batch.loss(network, passes))


def _copy(network: ShareNetwork) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in network.state_dict().items()}
