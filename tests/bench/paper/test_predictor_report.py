"""Promises of the predictor report: who wins, and what the closing table and the figures show."""

from __future__ import annotations

import pandas as pd

from workbench.paper.predictors import beside_paper, interval_figure, skill_figure, winner


def found() -> pd.DataFrame:
    rows = []
    for name, skill, seconds in (
        ("oracle", 1.0, 0.1),
        ("slow", 0.9004, 1e-2),
        ("fast", 0.9, 1e-5),
        ("random", 0.0, 1e-6),
    ):
        for mix in ("sticky", "uniform"):
            for interval in (1, 8):
                for slots in (2, 3):
                    row = {"predictor": name, "mix": mix, "interval": interval, "slots": slots, "skill": skill}
                    rows.append(
                        {**row, "mass": 0.5, "of_oracle": 0.75, "moved_bytes": 5, "prediction_median_s": seconds}
                    )
    return pd.DataFrame(rows)


def test_the_winner_is_the_faster_of_equals_and_never_a_bound() -> None:
    table = found()
    assert winner(table) == "fast"
    table.loc[table["predictor"] == "slow", "skill"] = 0.95
    assert winner(table) == "slow"


def test_the_table_says_where_nothing_was_trained() -> None:
    scores = pd.DataFrame(
        [{"predictor": "frequency", "mix": mix, "accuracy": value} for mix, value in (("a", 0.5), ("b", 0.7))]
    )
    table = beside_paper(found(), scores).set_index("what")["here"]
    assert table["Table 2, accuracy of eMoE-A"] == "not trained"
    assert table["accuracy of decayed frequency"] == "50% to 70%"
    assert table["least mass relative to the oracle's"] == "75.0% (fast)"


def test_figures_name_every_predictor() -> None:
    skill = skill_figure(found()[found()["interval"] == 1], 6)
    assert [text.get_text() for text in skill.axes[0].get_yticklabels()] == ["oracle", "slow", "fast", "random"]
    interval = interval_figure(found()[found()["slots"] == 2], 6)
    assert [text.get_text() for text in interval.legends[0].get_texts()] == ["oracle", "slow", "fast"]
