"""Ends an answer at a text: nothing of it, and nothing behind it, is passed on.

Text that may be the beginning of a stop string is held back until it is known not to be one.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The text of one answer on its way out; ``found`` once a stop string was met."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take new text; return what may be passed on."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            passed, self._held = self._held[: min(places)], ""
            return passed
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def finish(self) -> str:
        """Return what was held back for nothing."""
        passed, self._held = self._held, ""
        return passed


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that begins a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
