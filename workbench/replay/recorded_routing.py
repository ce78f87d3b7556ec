"""Where recorded routing comes from: a trace on disk, or an embedded model answering the project's own prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emoe_core.errors import OptionError
from emoe_core.experts.trace import RoutingTrace
from workbench.models.names import resolve_model
from workbench.models.reference import EMBEDDED

OWN = "own"
ANSWER_TOKENS = 160
Progress = Callable[[int, int], None]


def recorded_trace(source: str, progress: Progress | None = None) -> tuple[RoutingTrace, str]:
    """Return a recorded trace and what to call it.

    Parameters
    ----------
    source : str
        "reference" or "carved" (recorded on the twenty prompts of the fixture where that is not cached), or a file that
        `RoutingTrace.save` wrote.
    progress : callable, optional
        Called with (prompts done, prompts in all) while a model is recorded.

    Raises
    ------
    OptionError
        When there is no such source.
    """
    if source in EMBEDDED:
        from workbench.replay.references import reference_outputs
        from workbench.workloads.fixture import load_fixture

        rows = load_fixture()
        found = reference_outputs(
            resolve_model(source), rows["prompt"], rows["task"], max_new_tokens=ANSWER_TOKENS, progress=progress
        )
        return found.trace, f"the embedded model '{source}' on {len(rows)} prompts"
    path = Path(source)
    if not path.is_file():
        raise OptionError(
            f"no routing named {source!r}: give '{OWN}' (random routers), {', '.join(map(repr, EMBEDDED))} or the file "
            f"of a recorded trace (.npz)"
        )
    return RoutingTrace.load(path), f"the trace {path.name}"
