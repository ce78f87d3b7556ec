"""How alike two all-resident runs are that differ only by rounding: the floor that text similarity is read against.

Greedy text amplifies rounding: where two tokens are nearly as likely, the last bit decides, and the texts part. So a
lossy run cannot be expected to come closer to all-resident texts than all-resident runs come to each other. Here the
first prompts of a configuration are answered by stock transformers with every expert resident, once with the experts
multiplied in groups (its default) instead of one by one, once in bfloat16 instead of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd

from emoe_core.errors import OptionError
from workbench.models.names import resolve_model
from workbench.quality.configuration import ExperimentConfig
from workbench.quality.experiment import all_resident
from workbench.quality.similarity import similarity
from workbench.quality.token_quality import bootstrap_interval
from workbench.systems.stock import greedy_answers, load_stock
from workbench.workloads import prompt_stream

VARIANTS = {"grouped products": ("grouped_mm", None), "bfloat16": ("eager", "bfloat16")}
Progress = Callable[[str, int, int], None]


def noise_floor(config: ExperimentConfig, progress: Progress | None = None) -> pd.DataFrame:
    """Answer the first ``answers`` prompts of a configuration all-resident, in ways that differ by rounding only.

    Returns
    -------
    DataFrame
        One row a way: label, similarity (mean over prompts, with its 95% interval ``_low`` and ``_high``),
        identical (share of texts that are equal), prompts.

    Raises
    ------
    OptionError
        When no answers were asked for.
    """
    if config.answers < 1:
        raise OptionError("the noise floor is of answers: set answers to 1 or more")
    checkpoint = resolve_model(config.model)
    prompts = prompt_stream(config.stream())
    reference = all_resident(config, checkpoint, prompts, "reference", progress)
    expected = [output.text for output in reference.outputs[: config.answers]]
    asked = [output.prompt_ids for output in reference.outputs[: config.answers]]
    rows = []
    for label, (implementation, dtype) in VARIANTS.items():
        report = None if progress is None else partial(progress, label)
        model = load_stock(checkpoint, dtype or config.dtype, implementation)
        given = greedy_answers(model, checkpoint, asked, config.max_new_tokens, report)
        found = similarity(expected, given)
        low, high = bootstrap_interval(found, seed=config.seed)
        rows.append(
            {
                "label": label,
                "similarity": float(found.mean()),
                "similarity_low": low,
                "similarity_high": high,
                "identical": sum(a == b for a, b in zip(expected, given, strict=True)) / len(given),
                "prompts": len(given),
            }
        )
    return pd.DataFrame(rows)
