"""What the model says when every expert is resident: the standard that quality is measured against.

For each prompt of a stream: its own greedy continuation, the hidden states that entered the output embedding while
that continuation was scored token by token (teacher forcing), the log-probabilities, and the routing trace. The hidden
states give the whole output distribution back through the output embedding, at a hundredth of its size.

The work runs in a process of its own, so that the memory of an all-resident model never counts for a run that is
compared with it, and is cached under a hash of everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emoe_core
from emoe_core.cache import cache_dir
from emoe_core.checkpoint import open_checkpoint
from emoe_core.errors import ExperimentError
from emoe_core.routing import RoutingTrace

FORMAT = 1
BATCH = 8
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class ReferenceSpec:
    """Everything that reference outputs depend on: model (content hash), dtype, prompts with tasks, output length."""

    checkpoint: str
    source_hash: str
    dtype: str
    prompts: tuple[str, ...]
    tasks: tuple[str, ...]
    max_new_tokens: int
    device: str = "cpu"

    def key(self) -> str:
        """Return the cache key: a hash of all fields but the path, of the format, and of the library versions."""
        import transformers

        content = {
            **asdict(self),
            "format": FORMAT,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        del content["checkpoint"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class ReferenceOutput:
    """One prompt's reference: token ids, text, hidden states [n, H], log-probabilities float32 [n]."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    hidden: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Reference:
    """Reference outputs of a prompt list, in order, and the trace of prompts and continuations."""

    outputs: tuple[ReferenceOutput, ...]
    trace: RoutingTrace
    folder: Path


def reference_outputs(
    checkpoint: str | Path,
    prompts: Sequence[str],
    tasks: Sequence[str],
    *,
    max_new_tokens: int,
    dtype: str = "auto",
    device: str = "cpu",
    progress: ProgressCallback | None = None,
) -> Reference:
    """Return the all-resident outputs of a list of prompts, from the cache or from a process made for it.

    Raises
    ------
    ExperimentError
        When the process fails; its last line is in the message.
    """
    index = open_checkpoint(checkpoint, dtype)
    spec = ReferenceSpec(
        str(index.path),
        index.source_hash,
        str(index.dtype).removeprefix("torch."),
        tuple(prompts),
        tuple(tasks),
        max_new_tokens,
        device,
    )
    folder = cache_dir() / "references" / spec.key()
    if not (folder / "outputs.pt").exists():
        _compute_in_own_process(spec, folder, progress)
    return _read(folder)


def _compute_in_own_process(spec: ReferenceSpec, folder: Path, progress: ProgressCallback | None) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        (Path(scratch) / "spec.json").write_text(json.dumps(asdict(spec)))
        process = subprocess.Popen(
            [sys.executable, "-m", "workbench.reference_outputs", scratch],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
        assert process.stdout is not None
        for line in process.stdout:
            if progress is not None and line.startswith("done "):
                _, done, total = line.split()
                progress(int(done), int(total))
        _, errors = process.communicate()
        if process.returncode != 0:
            last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise ExperimentError(f"the all-resident reference could not be computed: {last[0]}")
        (Path(scratch) / "spec.json").unlink()
        if not folder.exists():
            Path(scratch).rename(folder)
            Path(scratch).mkdir()


def _read(folder: Path) -> Reference:
    rows = torch.load(folder / "outputs.pt", weights_only=True)
    outputs = tuple(
        ReferenceOutput(tuple(row["prompt_ids"]), tuple(row["token_ids"]), row["text"], row["hidden"], row["logprobs"])
        for row in rows
    )
    return Reference(outputs, RoutingTrace.load(folder / "trace.npz"), folder)


def _compute(folder: Path) -> None:
    raw = json.loads((folder / "spec.json").read_text())
    spec = ReferenceSpec(**{**raw, "prompts": tuple(raw["prompts"]), "tasks": tuple(raw["tasks"])})
    # Prompts of similar length share a batch, so that little of it is padding.
    order = np.argsort([len(prompt) for prompt in spec.prompts], kind="stable").tolist()
    total = 2 * len(order)
    common: dict[str, Any] = {"dtype": spec.dtype, "device": spec.device, "predictor": None, "tier": "disk"}
    rows: dict[int, dict[str, object]] = {}
    with emoe_core.load(spec.checkpoint, budget="100%", **common) as engine:
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            answers = engine.generate(
                [spec.prompts[place] for place in chosen],
                [spec.tasks[place] for place in chosen],
                max_new_tokens=spec.max_new_tokens,
                batch_size=BATCH,
            )
            for place, answer in zip(chosen, answers, strict=True):
                rows[place] = {"prompt_ids": answer.prompt_ids, "token_ids": answer.token_ids, "text": answer.text}
            print("done", start + len(chosen), total, flush=True)
    with emoe_core.load(spec.checkpoint, budget="100%", record=True, **common) as engine:
        for place in range(len(spec.prompts)):
            pair = (rows[place]["prompt_ids"], rows[place]["token_ids"])
            scored = engine.score([pair], [spec.tasks[place]])[0]  # type: ignore[list-item]
            rows[place] |= {"hidden": scored.hidden, "logprobs": scored.logprobs}
            print("done", len(order) + place + 1, total, flush=True)
        engine.trace().save(folder / "trace.npz")
    plain = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in rows[place].items()}
        for place in range(len(spec.prompts))
    ]
    torch.save(plain, folder / "outputs.pt")


if __name__ == "__main__":
    _compute(Path(sys.argv[1]))
