"""Twenty prompts of our own, for continuous integration and for notebooks with small defaults.

The text is original and free to use for anything. It needs no download and no preparation.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from workbench.workloads.store import features

if TYPE_CHECKING:
    import datasets


@cache
def load_fixture() -> datasets.Dataset:
    """Return the fixture: 20 items over the six task types, with the columns of a prepared task."""
    import datasets

    text = files("workbench.workloads").joinpath("data", "fixture.jsonl").read_text(encoding="utf-8")
    return datasets.Dataset.from_list(
        [json.loads(line) for line in text.splitlines() if line.strip()], features=features()
    )
