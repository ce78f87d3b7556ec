"""What an engine is told about each prompt's task type: the truth, nothing, a classifier's word, or errors on purpose.

``given`` is the label that the data set gives, ``none`` makes every prompt unknown (a task-agnostic system), and
``keywords`` is what the engine's own classifier says. ``label_error`` replaces that share of the labels, drawn by the
seed, by another task type, as a classifier that errs would (Fig. 19 of the eMoE paper). The warm-up's labels are never
made wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from emoe_core.errors import OptionError, require_known
from emoe_core.planning.classifier import classify
from emoe_core.planning.tasks import TASK_TYPES, UNKNOWN
from workbench.workloads import Prompt

LABELS = ("given", "none", "keywords")


def check_labels(labels: str, label_error: float) -> None:
    """Raise OptionError when the two do not make sense."""
    require_known(labels, LABELS, "labels")
    if not 0.0 <= label_error <= 1.0:
        raise OptionError(f"label_error is {label_error}: it is a share, between 0 and 1")
    if label_error and labels == "none":
        raise OptionError("label_error needs labels to be wrong about: use labels='given'")


def told_tasks(prompts: Sequence[Prompt], labels: str, label_error: float = 0.0, seed: int = 0) -> list[str]:
    """Return the task type that the engine is told for each prompt.

    Parameters
    ----------
    prompts : sequence of Prompt
    labels : str
        One of `LABELS`.
    label_error : float
        Share of prompts, rounded to whole prompts, whose label is replaced by another task type.
    seed : int
    """
    if labels == "none":
        return [UNKNOWN] * len(prompts)
    told = [classify(prompt.text) if labels == "keywords" else prompt.task for prompt in prompts]
    draw = random.Random(seed)
    for place in draw.sample(range(len(prompts)), round(label_error * len(prompts))):
        told[place] = draw.choice([task for task in TASK_TYPES if task not in (prompts[place].task, told[place])])
    return told
