"""What the model says when every expert is resident: the standard that quality is measured against.

For each prompt of a stream: its own greedy continuation, the hidden states that entered the output embedding while
that continuation was scored token by token (teacher forcing), the log-probabilities, and the routing trace. The hidden
states give the whole output distribution back through the output embedding, at a hundredth of its size.

The work runs in a process of its own, so that the memory of an all-resident model never counts for a run that is
compared with it. Outputs are cached prompt by prompt under a hash of everything they depend on, so runs whose streams
overlap share them and an interrupted run goes on where it stopped. Prompts are answered in batches of similar length:
where two tokens are equally likely within rounding, the batch may decide, so a run should record `Reference.hash`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import ExperimentError
from emoe_core.experts.trace import RoutingTrace
from emoe_core.files import whole_file
from emoe_core.loader.cache_folder import cache_dir
from workbench.measure.job import answer_job, report_progress
from workbench.measure.launch import launch
from workbench.replay.scoring import Scored, score

FORMAT = 2
BATCH = 24
TRACE_COLUMNS = ("position", "prefill", "chosen", "weight")
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class ReferenceSpec:
    """What the outputs of any prompt depend on: model (content hash), dtype, output length, kind of device, threads.

    Sums over more or fewer threads round differently, so a control with another number would not read exactly 1.
    """

    checkpoint: str
    source_hash: str
    dtype: str
    max_new_tokens: int
    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)

    def folder(self) -> Path:
        """Return where the outputs rest: a hash of all fields but the path, of the format, and of the libraries."""
        import transformers

        libraries = {"torch": torch.__version__, "transformers": transformers.__version__}
        content = {**asdict(self), "format": FORMAT, **libraries}
        del content["checkpoint"]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
        return cache_dir() / "references" / key

    def path(self, prompt: str) -> Path:
        """Return the file of one prompt's outputs."""
        return self.folder() / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.pt"


@dataclass(frozen=True)
class ReferenceOutput:
    """One prompt's reference: token ids, text, hidden states [n, H], log-probabilities float32 [n]."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    hidden: torch.Tensor
    logprobs: torch.Tensor

    @property
    def hash(self) -> str:
        """What tells this continuation of this prompt from others: of all token ids."""
        return hashlib.sha256(json.dumps([self.prompt_ids, self.token_ids]).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Reference:
    """Reference outputs of a prompt list, in order, and the trace of prompts and continuations (request = place)."""

    outputs: tuple[ReferenceOutput, ...]
    trace: RoutingTrace

    @property
    def hash(self) -> str:
        """SHA-256 over all token ids: runs with equal hashes were scored on the same text."""
        ids = [[output.prompt_ids, output.token_ids] for output in self.outputs]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


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
    dtype = str(index.dtype).removeprefix("torch.")
    spec = ReferenceSpec(str(index.path), index.source_hash, dtype, max_new_tokens, device)
    absent = sorted({prompt for prompt in prompts if not spec.path(prompt).exists()})
    if absent:
        _compute_in_own_process(spec, absent, progress)
    return _read(tuple(spec.path(prompt) for prompt in prompts), tuple(tasks))


@lru_cache(maxsize=4)
def _read(paths: tuple[Path, ...], tasks: tuple[str, ...]) -> Reference:
    """Return what lies in the cache; variants of one stream, and of one warm-up, read it once."""
    stored = {path: read_output(path) for path in set(paths)}
    return Reference(tuple(stored[path][0] for path in paths), _trace([stored[path][1] for path in paths], tasks))


def _compute_in_own_process(spec: ReferenceSpec, prompts: Sequence[str], progress: ProgressCallback | None) -> None:
    spec.folder().mkdir(parents=True, exist_ok=True)
    job = {"spec": asdict(spec), "prompts": list(prompts)}
    launched = launch("workbench.replay.references", job, progress=progress)
    launched.answer("the all-resident reference could not be computed")


def read_output(path: Path) -> tuple[ReferenceOutput, dict[str, torch.Tensor]]:
    try:
        row = torch.load(path, weights_only=True)
        output = ReferenceOutput(
            tuple(row["prompt_ids"]), tuple(row["token_ids"]), row["text"], row["hidden"], row["logprobs"]
        )
        _trace([row["trace"]], [""])
        return output, row["trace"]
    except Exception as error:  # a damaged archive raises many unrelated types
        raise ExperimentError(
            f"cached reference output {path} is damaged ({error}): delete it and run again"
        ) from error


def _trace(rows: Sequence[dict[str, torch.Tensor]], tasks: Sequence[str]) -> RoutingTrace:
    columns = {name: np.concatenate([row[name].numpy() for row in rows]) for name in TRACE_COLUMNS}
    chosen = columns.pop("chosen").astype(np.uint16)
    return RoutingTrace(
        **columns,
        chosen=chosen,
        served=chosen,
        request=np.repeat(np.arange(len(rows), dtype=np.int32), [len(row["position"]) for row in rows]),
        tasks=dict(enumerate(tasks)),
        experts=int(rows[0]["experts"]),
    )


def _compute(raw: dict[str, Any]) -> dict[str, Any]:
    spec, prompts = ReferenceSpec(**raw["spec"]), raw["prompts"]
    # Prompts of similar length share a batch, so that little of it is padding.
    prompts.sort(key=len)
    torch.set_num_threads(spec.threads)
    with emoe_core.load(
        spec.checkpoint, budget="100%", dtype=spec.dtype, device=spec.device, predictor=None, record=True
    ) as engine:
        for start in range(0, len(prompts), BATCH):
            texts = prompts[start : start + BATCH]
            answers = engine.generate(texts, max_new_tokens=spec.max_new_tokens, batch_size=BATCH)
            for place, (prompt, answer) in enumerate(zip(texts, answers, strict=True)):
                engine.forget_trace()
                scored = score(engine, [(answer.prompt_ids, answer.token_ids)])[0]
                _write(spec.path(prompt), answer, scored, engine.trace())
                report_progress(start + place + 1, len(prompts))
    return {}


def _write(path: Path, answer: emoe_core.Generation, scored: Scored, trace: RoutingTrace) -> None:
    columns = {name: np.asarray(getattr(trace, name)) for name in TRACE_COLUMNS}
    columns["chosen"] = columns["chosen"].astype(np.int16)
    row = {
        "prompt_ids": list(answer.prompt_ids),
        "token_ids": list(answer.token_ids),
        "text": answer.text,
        "hidden": scored.hidden.clone(),
        "logprobs": scored.logprobs,
        "trace": {name: torch.from_numpy(column) for name, column in columns.items()}
        | {"experts": torch.tensor(trace.experts)},
    }
    with whole_file(path) as scratch:
        torch.save(row, scratch)


if __name__ == "__main__":
    sys.exit(answer_job(_compute))
