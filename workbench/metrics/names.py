"""From what a user types to names of metrics: a name, or the words that tables show for it.

Tables show `fresh_ttft_s` as "fresh ttft". Words that stand for several metrics are refused with their names; what
stands for none is answered with names that are close.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from emoe_core.errors import ExperimentError, did_you_mean
from workbench.metrics.show import words_of

SUGGESTED = 6


def named_metrics(asked: Iterable[str], known: Collection[str]) -> set[str]:
    """Return the metrics that texts stand for.

    Raises
    ------
    ExperimentError
        When a text stands for none of `known`, or for several.
    """
    return {_named(text, known) for text in asked}


def _named(text: str, known: Collection[str]) -> str:
    if text in known:
        return text
    wanted = _plain(text)
    # A whole name in other writing ("slot bytes") goes before a name without its unit ("slot").
    for spelled in (_plain, _shown):
        found = sorted(name for name in known if spelled(name) == wanted)
        if len(found) == 1:
            return found[0]
        if found:
            raise ExperimentError(f"{text!r} stands for {' and '.join(found)}: give one of these names.")
    raise ExperimentError(f"no metric {text!r} is in both.{_suggestion(wanted, known)}")


def _suggestion(wanted: str, known: Collection[str]) -> str:
    names = sorted(known)
    if len(names) <= SUGGESTED:
        return f" Metrics of both: {', '.join(names) or 'none'}."
    words = {word for name in names for word in _plain(name).split()}
    parts = [wanted, *difflib.get_close_matches(wanted, words)]
    holding = [name for name in names if wanted and any(part in _plain(name) for part in parts)]
    spellings = {spelled(name): name for spelled in (_shown, _plain) for name in names}
    alike = [spellings[found] for found in difflib.get_close_matches(wanted, spellings, n=SUGGESTED)]
    close = list(dict.fromkeys([*alike, *holding]))[:SUGGESTED]
    return did_you_mean(close) or f" {len(names)} others are: leave out --metric and give --all to see them."


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _shown(name: str) -> str:
    return _plain(words_of(name))
