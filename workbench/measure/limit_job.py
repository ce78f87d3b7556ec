"""One trial: a configuration reads prompts of a length and a batch size and decodes a few tokens, in its own process.

Started by `limit_trials.py` under a hard memory limit. Prompts are random token ids, so that any length can be made;
end-of-text is not heeded, so that every trial decodes the same number of tokens. Stock transformers and emoe run the
same code here: a pass over the prompts that keeps the last position's logits only, then one pass a token, greedily,
with a KV cache.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import emoe_core
from workbench.machine.process_counters import read_bytes
from workbench.measure.job import answer_job

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def _loaded(spec: dict[str, Any]) -> Iterator[Any]:
    if spec["options"] is None:
        from workbench.systems.stock import load_stock

        yield load_stock(spec["checkpoint"], spec["dtype"])
    else:
        options = {"device": "cpu", "dtype": spec["dtype"], **spec["options"]}
        with emoe_core.load(spec["checkpoint"], **options) as engine:
            yield engine.model


def read_and_decode(model: Any, token_ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Read prompts and decode greedily.

    Parameters
    ----------
    model : PreTrainedModel
    token_ids : torch.Tensor
        int64 [batch, tokens], without padding.
    new_tokens : int
        Passes after the prompts'; each gives a token a row.

    Returns
    -------
    dict
        ``ttft_s``, ``decode_tokens_per_s`` (all rows together, all passes), ``decode_read_bytes`` (from the
        disk, in all passes after the prompts').
    """
    import torch

    with torch.no_grad():
        started = time.perf_counter()
        output = model(input_ids=token_ids, use_cache=True, logits_to_keep=1)
        chosen = output.logits[:, -1:].argmax(-1)
        passes, before = [time.perf_counter()], read_bytes()
        for _ in range(new_tokens):
            output = model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            chosen = output.logits[:, -1:].argmax(-1)
            passes.append(time.perf_counter())
    return {
        "ttft_s": passes[0] - started,
        "decode_tokens_per_s": token_ids.shape[0] * new_tokens / (passes[-1] - passes[0]),
        "decode_read_bytes": float(read_bytes() - before),
    }


def _trial(spec: dict[str, Any]) -> dict[str, float]:
    import torch

    started = time.perf_counter()
    with _loaded(spec) as model:
        load_s = time.perf_counter() - started
        shape = (spec["batch"], spec["prompt_tokens"])
        generator = torch.Generator().manual_seed(spec["seed"])
        ids = torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator)
        return {"load_s": load_s, **read_and_decode(model, ids, spec["new_tokens"])}


if __name__ == "__main__":
    sys.exit(answer_job(_trial))
