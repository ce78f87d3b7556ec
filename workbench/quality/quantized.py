"""Experts in 8 or 4 bits: the other way to save their memory (Table 3 of the eMoE paper).

Every expert matrix is rounded to a GGUF block format (32 weights share a scale) by the ``gguf`` package and expanded
again, and the stock model with those experts is scored on the all-resident model's own continuations. That is the
quality of round-to-nearest quantisation without calibration; dense weights stay as they are. It says nothing of speed:
the matrices are multiplied in full precision here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gguf import GGMLQuantizationType, quants

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import require_known
from workbench.quality.token_quality import compare
from workbench.replay.references import Reference
from workbench.systems.stock import greedy_answers, load_stock
from workbench.workloads import Prompt

FORMATS = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
# A block of 32 weights and its 16-bit scale.
BITS_PER_WEIGHT = {"q8_0": 8.5, "q4_0": 4.5}
BLOCK = 32


def round_trip(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """Return a matrix after quantisation and expansion; blocks run along its last dimension.

    Parameters
    ----------
    matrix : torch.Tensor
        [rows, columns], any floating dtype; columns are padded with zeros to whole blocks.
    name : str
        One of `FORMATS`.
    """
    require_known(name, FORMATS, "expert format")
    columns = matrix.shape[1]
    padded = torch.nn.functional.pad(matrix.detach().float(), (0, -columns % BLOCK)).contiguous().numpy()
    expanded = quants.dequantize(quants.quantize(padded, FORMATS[name]), FORMATS[name])
    return torch.from_numpy(np.ascontiguousarray(expanded[:, :columns])).to(matrix.dtype)


def quantized_model(checkpoint: str | Path, name: str, dtype: str = "float32", progress: Any = None) -> Any:
    """Return the stock model with every routed expert after `round_trip`.

    Parameters
    ----------
    checkpoint : str or Path
    name : str
        One of `FORMATS`.
    dtype : str
        Of the computation.
    progress : callable, optional
        Called with (MoE layers done, all).
    """
    index = open_checkpoint(checkpoint, dtype)
    model = load_stock(index.path, index.dtype)
    model.requires_grad_(False)
    for done, layer in enumerate(index.layers, start=1):
        module = model.get_submodule(layer.name)
        for weight in module.parameters(recurse=False):
            if weight.dim() != 3:
                continue  # biases stay as they are
            for expert in range(weight.shape[0]):
                # Blocks run along the inputs of a matrix product, wherever the family keeps them.
                transposed = bool(getattr(module, "is_transposed", False))
                matrix = weight[expert].T if transposed else weight[expert]
                rounded = round_trip(matrix, name)
                weight[expert].copy_(rounded.T if transposed else rounded)
        if progress is not None:
            progress(done, len(index.layers))
    return model


@torch.no_grad()
def score_quantized(
    checkpoint: str | Path,
    name: str,
    prompts: Sequence[Prompt],
    reference: Reference,
    *,
    answers: int = 0,
    max_new_tokens: int = 24,
    dtype: str = "float32",
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Score the all-resident model's continuations with quantised experts.

    Returns
    -------
    requests : DataFrame
        One row a prompt: request, task, output_tokens, kl_nats, log_ratio_nats, top1_agreement.
    texts : list of str
        Greedy answers to the first ``answers`` prompts.
    """
    report = progress or (lambda stage, done, total: None)
    model = quantized_model(checkpoint, name, dtype, lambda done, total: report(f"{name} experts", done, total))
    head = model.get_output_embeddings()
    rows = []
    for place, (prompt, expected) in enumerate(zip(prompts, reference.outputs, strict=True)):
        ids = torch.tensor([[*expected.prompt_ids, *expected.token_ids]])
        kept = len(expected.token_ids)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept + 1).logits[0, -kept - 1 : -1].float()
        quality = compare(head(expected.hidden).float(), logits, torch.tensor(expected.token_ids))
        hashes = {"prompt_hash": prompt.hash, "scored_hash": expected.hash}
        rows.append({"request": prompt.request_id, "task": prompt.task, **quality.row(), **hashes})
        report(f"{name} score", place + 1, len(prompts))
    asked = [expected.prompt_ids for expected in reference.outputs[:answers]]
    texts = greedy_answers(model, checkpoint, asked, max_new_tokens) if answers else []
    return pd.DataFrame(rows), texts
