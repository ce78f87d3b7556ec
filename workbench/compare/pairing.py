"""Which rows of two tables are of one prompt.

Prompts are paired by their hash (or their text), within a variant where a run compared several. Tables recorded before
prompts had hashes are paired by place in the stream, and only when the hash of the whole stream is the same. What the
runs held before a pair is not part of it: where other prompts came before, `pairs_after_others` counts the pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pandas.api.types import is_numeric_dtype

if TYPE_CHECKING:
    import pandas as pd

VARIANT, PLACE, HASH, TEXT = "label", "request", "prompt_hash", "prompt"


def pair_keys(first: pd.DataFrame, second: pd.DataFrame, same_data: bool) -> list[str] | None:
    """Return the columns that pair the rows of two tables, None when nothing does."""

    def both_have(column: str) -> bool:
        return has_column(first, column) and has_column(second, column)

    variant = [VARIANT] if both_have(VARIANT) else []
    if both_have(HASH):
        # With equal streams the place tells repeats of a prompt apart.
        return [*variant, HASH, *([PLACE] if same_data and both_have(PLACE) else [])]
    if both_have(TEXT) and not any(is_numeric_dtype(table[TEXT]) for table in (first, second)):
        return [*variant, TEXT]
    return [*variant, PLACE] if same_data and both_have(PLACE) else None


def why_unpaired(first: pd.DataFrame, second: pd.DataFrame, same_data: bool | None) -> str:
    """Return in words what `pair_keys` missed; ``same_data`` is None where a run does not record its data."""
    lacking = f"{_lacking(first, second, HASH)}, which says which prompt a row is of"
    if same_data:
        return f"the data are the same, but {_lacking(first, second, PLACE, HASH)}: record one of them for each row"
    if same_data is None:
        return f"a run does not record its data (data_hash), and {lacking}"
    return f"the runs had other data, and {lacking}"


def side_by_side(first: pd.DataFrame, second: pd.DataFrame, keys: list[str]) -> pd.DataFrame | None:
    """Return one row a pair, columns ending in ``_a`` and ``_b``; None when rows of one prompt cannot be told apart."""
    tables = []
    for table in (first, second):
        # A stream longer than its data repeats prompts: the first occurrence is paired with the first.
        numbered = table.assign(occurrence=table.groupby(keys).cumcount())
        if HASH not in keys and TEXT not in keys and numbered["occurrence"].any():
            return None
        tables.append(numbered)
    return tables[0].merge(tables[1], on=[*keys, "occurrence"], suffixes=("_a", "_b"), validate="one_to_one")


def pairs_after_others(first: pd.DataFrame, second: pd.DataFrame, keys: list[str], pairs: int) -> int:
    """Return how many pairs came after other prompts in one run than in the other, rows being in stream order."""
    if PLACE in keys:
        return 0
    prompt = HASH if HASH in keys else TEXT
    streams = [
        {label: list(rows[prompt]) for label, rows in table.groupby(VARIANT)}
        if VARIANT in keys
        else {"": table[prompt]}
        for table in (first, second)
    ]
    after_the_same = 0
    for label, prompts in streams[0].items():
        for one, other in zip(prompts, streams[1].get(label, ()), strict=False):
            if one != other:
                break
            after_the_same += 1
    return max(0, pairs - after_the_same)


def has_column(table: pd.DataFrame, column: str) -> bool:
    """Say whether a table has a value of a column in every row."""
    return column in table and bool(table[column].notna().all())


def _lacking(first: pd.DataFrame, second: pd.DataFrame, *columns: str) -> str:
    """Say which table lacks columns, a column with gaps included."""
    without = [
        side for side, table in (("A", first), ("B", second)) if not any(has_column(table, name) for name in columns)
    ]
    tables = f"the table of {without[0]} has" if len(without) == 1 else "the tables have"
    return f"{tables} no complete column {' or '.join(f'`{name}`' for name in columns)}"
