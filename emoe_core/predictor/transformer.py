"""The trained predictor: a `ShareNetwork` over a `History`, and the file it rests in.

The file is safetensors with a JSON header in its metadata: format, model hash, data hash, variant, sizes, and the
metrics of its training. A predictor serves the model it was trained for and no other.

Unlike the others it predicts before it has seen anything: what it knows of the tasks is in its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file

from emoe_core.errors import OptionError, PredictorError
from emoe_core.files import parse, typed, whole_file
from emoe_core.predictor.history import History
from emoe_core.predictor.network import NetworkShape, ShareNetwork

FORMAT = 1
KEY = "emoe_predictor"


@dataclass(frozen=True)
class PredictorHeader:
    """What a trained predictor is: hashes of its model and of its training data, its shape, how training went."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    model_hash: str
    data_hash: str
    shape: NetworkShape
    metrics: Mapping[str, float] = field(default_factory=dict)


class TransformerPredictor:
    """Corrected decayed frequencies.

    Parameters
    ----------
    network : ShareNetwork
    header : PredictorHeader
    """

    name = "transformer"

    def __init__(self, network: ShareNetwork, header: PredictorHeader) -> None:
        self.network = network.eval()
        self.header = header
        self.history = History(header.shape.layers, header.shape.experts)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.network.state_dict().values())

    def fresh(self) -> TransformerPredictor:
        """Return a predictor with the same weights and no history."""
        return TransformerPredictor(self.network, self.header)

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Learn from one finished request; weights stay as they are."""
        self.history.observe(task, counts)

    def predict(self, task: str) -> np.ndarray:
        """Return expected shares of the task's next prompt, [layers, experts]."""
        with torch.inference_mode():
            logs = self.network.predict(
                torch.from_numpy(self.history.features(task)).unsqueeze(0),
                torch.tensor([self.header.shape.task_index(task)]),
                torch.from_numpy(self.history.base(task)).float().unsqueeze(0),
            )
        shares = logs[0].double().exp().numpy()
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def save(self, path: str | Path) -> Path:
        """Write the predictor, atomically, and return its path."""
        header = json.dumps({"format": FORMAT, **asdict(self.header)}, sort_keys=True)
        weights = {name: weight.contiguous() for name, weight in self.network.state_dict().items()}
        with whole_file(path) as scratch:
            save_file(weights, scratch, metadata={KEY: header})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, model_hash: str | None = None) -> TransformerPredictor:
        """Read a predictor, and check that it was trained for the model when a hash is given.

        Raises
        ------
        PredictorError
            When the file is missing, is no predictor of this format, is damaged, or is another model's.
        """
        header, weights = _read(Path(path))
        if model_hash is not None and header.model_hash != model_hash:
            raise PredictorError(
                f"{path} was trained for model {header.model_hash[:12]}, this model is {model_hash[:12]}: train one "
                "for this model with `emoe predictor train`"
            )
        if not header.shape.fits(weights):
            raise PredictorError(f"{path} is damaged (its weights do not fit its header): train it again")
        network = ShareNetwork(header.shape)
        network.load(weights)
        return cls(network, header)


def _read(path: Path) -> tuple[PredictorHeader, dict[str, torch.Tensor]]:
    if not path.is_file():
        raise PredictorError(f"there is no trained predictor at {path}: train one with `emoe predictor train`")
    try:
        with safe_open(path, framework="pt") as stream:
            raw = (stream.metadata() or {}).get(KEY)
            weights = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged file raises several types
        raise PredictorError(f"{path} is not a readable predictor ({error}): train it again") from error
    if raw is None:
        raise PredictorError(f"{path} holds no trained predictor: train one with `emoe predictor train`")
    try:
        content = parse(raw)
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != FORMAT:
            raise PredictorError(f"{path} has format {found}, this version reads {FORMAT}: train it again")
        return typed(PredictorHeader, content), weights
    except (ValueError, OptionError) as error:
        raise PredictorError(f"{path} has a damaged header ({error}): train it again") from error
