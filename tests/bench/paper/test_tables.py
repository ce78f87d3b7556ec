"""Tables tell units, and a smoke run is not set beside the paper."""

from __future__ import annotations

import pandas as pd
import pytest

from workbench.paper.tables import closing_table, shown

TABLE = pd.DataFrame({"label": ["a"], "slot_bytes": [3.5e6], "interval": ["8"], "hit_rate": [0.25], "exact": [True]})


def test_figures_are_shown_with_their_units_in_the_order_asked_for() -> None:
    found = shown(TABLE, ["hit_rate", "label", "slot_bytes", "not measured"]).data
    assert found.to_dict("records") == [{"hit rate": "25.0%", "label": "a", "slot bytes": "3.5 MB"}]
    assert list(shown(TABLE).data.loc[0]) == ["a", "3.5 MB", "8", "25.0%", True]


def test_fewer_than_eight_prompts_have_no_closing_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert closing_table(TABLE, 4) is None
    assert "smoke run: n = 4 prompts" in capsys.readouterr().out
    assert closing_table(TABLE, 8).data is TABLE
