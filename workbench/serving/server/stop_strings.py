"""Ends an answer at a text: nothing of it, and nothing behind it, is passed on.

Text that may be the beginning of a stop string is held back until it is known not to be one. Each character is looked
at once (Knuth, Morris and Pratt): its cost depends neither on the answer's length nor on that of its stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The text of one answer on its way out; ``found`` once a stop string was met."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Stop(stop) for stop in stops]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take new text; return what may be passed on."""
        if self.found:
            return ""
        before = len(self._held)
        self._held += text
        for place, character in enumerate(text, before + 1):
            # The first to be complete ends the answer, of two at once the one that began first.
            met = max((stop.length for stop in self._stops if stop.take(character)), default=0)
            if met:
                self.found = True
                passed, self._held = self._held[: place - met], ""
                return passed
        cut = len(self._held) - max((stop.begun for stop in self._stops), default=0)
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def finish(self) -> str:
        """Return what was held back for nothing."""
        passed, self._held = self._held, ""
        return passed


class _Stop:
    """One stop string against a text; ``begun`` of its characters are the last ones of the text."""

    def __init__(self, text: str) -> None:
        self.length = len(text)
        self.begun = 0
        self._text = text
        # Of each beginning of the stop string, the longest shorter one that it ends with.
        self._shorter = [0, 0]
        for character in text[1:]:
            self._shorter.append(self._after(self._shorter[-1], character))

    def take(self, character: str) -> bool:
        """Take the next character; return whether the stop string is complete with it."""
        self.begun = self._after(self.begun, character)
        return self.begun == self.length

    def _after(self, begun: int, character: str) -> int:
        while begun and self._text[begun] != character:
            begun = self._shorter[begun]
        return begun + (self._text[begun] == character)
