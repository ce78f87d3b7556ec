"""The report's figure of intervals is of runs that differ in interval and skipping alone."""

from __future__ import annotations

import pandas as pd

from workbench.paper.figures import interval_and_skipping

RATIO = {"perplexity_ratio": 1.0, "perplexity_ratio_low": 0.9, "perplexity_ratio_high": 1.1, "bytes_loaded": 1e6}


def runs(*rows: tuple[str, int, bool]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["budget", "interval", "skipping"])
    return table.assign(prompts=32, **RATIO)


def test_other_budgets_of_the_sweep_are_left_out() -> None:
    swept = runs(("60%", 40, False), ("50%", 1, False), ("50%", 8, False), ("50%", 16, False), ("50%", 8, True))
    figure = interval_and_skipping(swept)
    assert figure is not None
    moved = {line.get_label(): list(line.get_xdata()) for line in figure.axes[1].lines}
    assert moved == {"task skipping off": [1, 8, 16], "task skipping on": [8]}
    assert figure.axes[1].get_title(loc="right") == "n = 32 prompts"


def test_where_intervals_differ_with_budgets_nothing_is_drawn() -> None:
    assert interval_and_skipping(runs(("60%", 40, False), ("50%", 1, False))) is None
