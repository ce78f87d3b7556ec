"""Errors a user can cause and mend.

Every message says what is wrong and what to do about it; the command line prints it without a traceback. Mistakes of
our own code stay `AssertionError` or the built-in exceptions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class EmoeError(Exception):
    """Base of all errors that a user can mend."""


class BudgetError(EmoeError):
    """The expert budget cannot be understood or cannot hold what one forward pass needs."""


class CheckpointError(EmoeError):
    """The checkpoint is missing, is not a Mixture-of-Experts model, or is damaged."""


class PackError(EmoeError):
    """The expert pack is truncated, altered, or belongs to another checkpoint."""


class UnsupportedFamilyError(CheckpointError):
    """The model family has no expert layout that emoe can serve."""


class OptionError(EmoeError):
    """An option has an unknown name or a value outside its range."""


class PredictorError(EmoeError):
    """The trained predictor is missing, damaged, or belongs to another model."""


class IntegrationError(EmoeError):
    """The emoe experts function was reached in a way that it cannot serve exactly."""


class DataError(EmoeError):
    """A data set or a package that carries data is missing or damaged."""


class ExperimentError(EmoeError):
    """A sweep file, a notebook parameter or a recorded run is not usable."""


class LimitError(EmoeError):
    """No hard memory limit can be set on this machine, or a process cannot be put under it."""


def require_known(name: str, known: Collection[str], what: str) -> None:
    """Raise OptionError, which lists the known names of such a thing, for another name."""
    if name not in known:
        raise OptionError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")


def did_you_mean(close: Sequence[str]) -> str:
    """Return the end of a message about an unknown name, `` Did you mean 'a' or 'b'?``; empty where none is close."""
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the host or on a device."""
    # torch has no class of its own for the host, and is not imported here: the command line's help need not wait.
    told = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error) for t in told))
