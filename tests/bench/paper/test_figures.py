"""The report's figure of intervals is of runs that differ in interval and skipping alone."""

from __future__ import annotations

import pandas as pd

from workbench.paper.interval import swept_intervals

RATIO = {"perplexity_ratio": 1.0, "perplexity_ratio_low": 0.9, "perplexity_ratio_high": 1.1, "bytes_loaded": 1e6}


def runs(*rows: tuple[str, int, bool]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["budget", "interval", "skipping"])
    return table.assign(prompts=32, **RATIO)


def test_other_budgets_of_the_sweep_are_left_out() -> None:
    swept = runs(("60%", 40, False), ("50%", 1, False), ("50%", 8, False), ("50%", 16, False), ("50%", 8, True))
    figure = swept_intervals(swept)
    assert figure is not None
    ticks = [int(text.get_text()) for text in figure.axes[1].get_xticklabels()]
    moved = {line.get_label(): [ticks[round(x)] for x in line.get_xdata()] for line in figure.axes[1].lines}
    assert moved == {"uniform stream": [1, 8, 16], "uniform stream, task skipping": [8]}
    assert figure.axes[1].get_title(loc="right") == "n = 32 prompts"


def test_where_intervals_differ_with_budgets_nothing_is_drawn() -> None:
    assert swept_intervals(runs(("60%", 40, False), ("50%", 1, False))) is None
