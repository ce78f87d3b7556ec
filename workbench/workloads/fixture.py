"""Twenty prompts of our own, for continuous integration and for notebooks with small defaults.

The text is original and free to use for anything. It needs no download and no preparation.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from workbench.workloads.store import features

if TYPE_CHECKING:
    import datasets


def fixture_rows() -> list[dict[str, Any]]:
    """Return the fixture: 20 items over the six task types, each with the columns of a prepared task."""
    text = files("workbench.workloads").joinpath("data", "fixture.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@cache
def load_fixture() -> datasets.Dataset:
    """Return `fixture_rows` as a data set."""
    import datasets

    return datasets.Dataset.from_list(fixture_rows(), features=features())
