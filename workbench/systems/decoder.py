"""What the bench asks of a system: read a prompt, then take one given token after the other.

Every system decodes the same tokens, whatever it would have chosen itself (teacher forcing), so that all of them do the
same work; what it would have chosen is returned, to see that they compute the same model. This module imports nothing
heavy: the process of a small system stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Decoder(Protocol):
    """A loaded system; made by what `decoder_class` returns."""

    def prefill(self, token_ids: Sequence[int]) -> int:
        """Start a new sequence with a prompt; return the likeliest next token."""

    def decode(self, token_id: int) -> int:
        """Append a given token; return the likeliest next one."""

    def counters(self) -> dict[str, float]:
        """Return what the system counts of itself so far (names of `emoe_core.metrics.Counters`); may be empty."""

    def description(self) -> str:
        """Return what ran, in words: versions, settings that matter."""

    def close(self) -> None:
        """Release everything."""


def decoder_class(adapter: str) -> Callable[[dict[str, Any]], Decoder]:
    """Import what an adapter needs, and return what loads a system from a spec of `workbench.bench.prepare`."""
    if adapter == "emoe":
        from workbench.systems.engine import EngineDecoder

        return EngineDecoder
    if adapter == "stock":
        from workbench.systems.stock import StockDecoder

        return StockDecoder
    if adapter == "accelerate":
        from workbench.systems.accelerate_offload import OffloadedDecoder

        return OffloadedDecoder
    assert adapter == "llama.cpp", adapter
    from workbench.systems.llama_cpp import LlamaDecoder

    return LlamaDecoder
