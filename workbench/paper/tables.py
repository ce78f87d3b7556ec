"""Tables as a notebook shows them: figures with their units, and the closing table beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from workbench.metrics.show import show, title_of
from workbench.quality.token_quality import LEAST_PROMPTS

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler


def shown(table: pd.DataFrame, columns: Sequence[str] | None = None) -> Styler:
    """Return a table for people: numbers with the units of their columns' names; columns that it lacks are left out."""
    kept = list(table) if columns is None else [name for name in columns if name in table]
    texts = {
        title_of(str(name)): [show(str(name), value) for value in table[name]]
        if is_numeric_dtype(table[name]) and not is_bool_dtype(table[name])
        else list(table[name])
        for name in kept
    }
    return pd.DataFrame(texts).style.hide()


def closing_table(table: pd.DataFrame, measured: int, unit: str = "prompts") -> Styler | None:
    """Return the table "paper, here, why they differ"; of fewer than 8 prompts only say that they were a smoke run."""
    if measured < LEAST_PROMPTS:
        print(f"smoke run: n = {measured} {unit}, too few to stand beside the paper's figures")
        return None
    return table.style.hide()
