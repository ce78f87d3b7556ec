"""The longest prompt and the largest batch that a configuration survives under a hard memory limit (Figs 17 and 18).

All configurations get the same limit. By rule it is *stock's*: the smallest limit, to a step, at which transformers
with every expert resident answers a prompt of ``base_tokens``; measured, not computed. Under it each configuration is
tried with longer prompts (batch 1), then with larger batches (``batch_prompt_tokens`` a prompt), doubling and halving
(`threshold.py`). What a trial is, and what surviving means, `limit_trials.py` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import psutil

from emoe_core.budget import amount_bytes
from emoe_core.errors import ExperimentError, OptionError
from workbench.measure.launch import TOO_SLOW
from workbench.measure.limit_trials import STOCK, Configuration, Trial, Trials
from workbench.measure.threshold import largest_that_holds, most_questions, smallest_that_holds

MEGABYTE = 10**6
Progress = Callable[[str, int, int], None]
LIMIT_FORMS = '"stock", "stock + 200MB" or "900MB"'
_STOCK_LIMIT = re.compile(r"stock(?:\s*\+\s*(.+))?")


@dataclass(frozen=True)
class SearchConfig:
    """What is searched.

    Attributes
    ----------
    limit : str
        "stock" (the module's rule), "stock + 200MB", or bytes ("900MB").
    base_tokens : int
        Length of the prompt that the rule is about; longer prompts are tried from it upwards.
    max_tokens, max_batch : int
        Where the searches stop.
    batch_prompt_tokens : int
        Length of each prompt of a batch.
    resolution : float
        Results are known to this share of themselves.
    step_bytes : int
        The rule's limit is a multiple of it.
    """

    limit: str = STOCK
    base_tokens: int = 256
    max_tokens: int = 8192
    max_batch: int = 64
    batch_prompt_tokens: int = 256
    resolution: float = 0.05
    step_bytes: int = 16 * MEGABYTE

    def __post_init__(self) -> None:
        for name in ("base_tokens", "max_tokens", "max_batch", "batch_prompt_tokens", "step_bytes"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.base_tokens > self.max_tokens:
            raise OptionError(f"base_tokens {self.base_tokens} is above max_tokens {self.max_tokens}")
        if not 0 <= self.resolution < 1:
            raise OptionError(f"resolution is {self.resolution}; it must be in [0, 1)")
        assert self.extra_bytes is None or self.extra_bytes >= 0

    @property
    def extra_bytes(self) -> int | None:
        """Bytes given beyond what the rule comes to; None when the limit itself is given in bytes."""
        match = _STOCK_LIMIT.fullmatch(self.limit.strip())
        if match is None:
            amount_bytes(self.limit, LIMIT_FORMS)
            return None
        return 0 if match[1] is None else amount_bytes(match[1], LIMIT_FORMS)


def configurations(budget: str, names: Sequence[str] = ("stock", "all", "exact", "rerouting")) -> list[Configuration]:
    """Return configurations by name.

    "stock" is transformers with every expert resident; "all" is emoe with them too; "exact" and "rerouting" have an
    expert budget, at miss tolerance 0 and 1. A trial is one request without history, so experts come on demand (no
    predictor).
    """
    known = {
        "stock": Configuration(STOCK, None),
        "all": Configuration("emoe 100%", (("budget", "100%"), ("predictor", None))),
        "exact": Configuration(f"emoe {budget}, exact", (("budget", budget), ("predictor", None))),
        "rerouting": Configuration(
            f"emoe {budget}, rerouting", (("budget", budget), ("predictor", None), ("tolerance", 1.0))
        ),
    }
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        raise OptionError(f"unknown configurations {', '.join(unknown) or '(none)'}: choose of {', '.join(known)}")
    return [known[name] for name in names]


def require_host(device: str) -> None:
    """Refuse a device whose memory a control group does not limit."""
    if device not in ("cpu", "auto"):
        raise OptionError(f"device {device!r}: a control group limits host memory only, so models run on the CPU here")


def resolve_limit(trials: Trials, config: SearchConfig, progress: Progress | None = None) -> int:
    """Return the limit in bytes, measuring what stock needs where the rule asks for it.

    Raises
    ------
    ExperimentError
        When stock does not answer even with all of the machine's memory.
    """
    extra_bytes = config.extra_bytes
    if extra_bytes is None:
        return amount_bytes(config.limit)
    stock = Configuration(STOCK, None)
    weights_bytes = trials.index.expert_bytes_total + trials.index.dense_bytes_total
    start_bytes = weights_bytes + 512 * MEGABYTE
    asked, most = 0, most_questions(1, max(start_bytes // config.step_bytes, 1))

    def answers(limit_bytes: int) -> bool:
        nonlocal asked
        asked += 1
        if progress is not None:
            progress("stock's limit", asked, max(asked, most))
        return trials.run(stock, config.base_tokens, 1, limit_bytes).survived

    found = smallest_that_holds(answers, start_bytes, config.step_bytes, int(psutil.virtual_memory().total))
    if found is None:
        raise ExperimentError(
            f"stock transformers cannot answer {config.base_tokens} tokens within this machine's memory: there is "
            f"nothing to hold emoe against. Give a limit in bytes, or fewer base_tokens."
        )
    return found + extra_bytes


def search(
    trials: Trials,
    config: SearchConfig,
    tried: Sequence[Configuration],
    limit_bytes: int,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Find each configuration's longest prompt and largest batch under one limit.

    Returns
    -------
    DataFrame
        One row a configuration: ``longest_tokens`` and ``largest_batch`` (0: none survived), whether each is the cap
        (``tokens_capped``, ``batch_capped``), ``slow_trials`` (how many counted as lost for being too slow at the
        limit), their ratios to stock's, and of the trial with the largest batch, run anew, ``decode_tokens_per_s``, its
        ratio to stock's, ``ttft_s``, ``group_peak_bytes`` and ``decode_read_bytes``.
    """
    return with_ratios(pd.DataFrame([_row(trials, config, one, limit_bytes, progress) for one in tried]))


def with_ratios(found: pd.DataFrame) -> pd.DataFrame:
    """Return the table with ``tokens_ratio``, ``batch_ratio`` and ``speed_ratio`` to stock's row.

    NaN where stock was not tried, survived nothing, or was stopped by the search's cap: its number is not known then.
    """
    stock = found[found["configuration"] == STOCK]
    names = (
        ("tokens_ratio", "longest_tokens", "tokens_capped"),
        ("batch_ratio", "largest_batch", "batch_capped"),
        ("speed_ratio", "decode_tokens_per_s", None),
    )
    ratios = {}
    for ratio, column, capped in names:
        known = len(stock) > 0 and not (capped and stock[capped].iloc[0])
        base = float(pd.to_numeric(stock[column]).iloc[0]) if known else 0.0
        ratios[ratio] = pd.to_numeric(found[column]) / (base if base else float("nan"))
    return found.assign(**ratios)


def _row(
    trials: Trials, config: SearchConfig, configuration: Configuration, limit_bytes: int, progress: Progress | None
) -> dict[str, Any]:
    longest = _largest(
        f"{configuration.name}: prompt",
        lambda tokens: trials.run(configuration, tokens, 1, limit_bytes),
        (config.base_tokens, config.max_tokens, config.resolution),
        progress,
    )
    batch = _largest(
        f"{configuration.name}: batch",
        lambda rows: trials.run(configuration, config.batch_prompt_tokens, rows, limit_bytes),
        (1, config.max_batch, config.resolution),
        progress,
    )
    best = trials.run(configuration, config.batch_prompt_tokens, batch, limit_bytes, again=True) if batch else None
    mine = [trial for trial in trials.done if trial.configuration == configuration.name]
    return {
        "configuration": configuration.name,
        "limit_bytes": limit_bytes,
        "longest_tokens": longest,
        "tokens_capped": longest == config.max_tokens,
        "largest_batch": batch,
        "batch_capped": batch == config.max_batch,
        "slow_trials": sum(trial.outcome == TOO_SLOW for trial in mine),
        "decode_tokens_per_s": None if best is None else best.decode_tokens_per_s,
        "ttft_s": None if best is None else best.ttft_s,
        "group_peak_bytes": None if best is None else best.group_peak_bytes,
        "decode_read_bytes": None if best is None else best.decode_read_bytes,
    }


def _largest(
    stage: str, trial: Callable[[int], Trial], bounds: tuple[int, int, float], progress: Progress | None
) -> int:
    """Search between (start, cap) to a resolution, reporting each trial."""
    asked, most = 0, most_questions(*bounds)

    def survives(number: int) -> bool:
        nonlocal asked
        found = trial(number)
        asked += 1
        if progress is not None:
            progress(stage, asked, max(asked, most))
        return found.survived

    found = largest_that_holds(survives, *bounds)
    if progress is not None:
        progress(stage, max(asked, most), max(asked, most))
    return found
