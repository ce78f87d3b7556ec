"""Where recorded routing comes from: a trace on disk, or an embedded model answering the project's own prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from emoe_core.errors import OptionError
from emoe_core.experts.trace import RoutingTrace
from emoe_core.files import whole_file
from emoe_core.loader.cache_folder import cache_dir
from workbench.models.names import resolve_model
from workbench.models.reference import EMBEDDED, RECIPES
from workbench.workloads.fixture import fixture_rows

OWN = "own"
ANSWER_TOKENS = 160
Progress = Callable[[int, int], None]


def recorded_trace(source: str, progress: Progress | None = None) -> tuple[RoutingTrace, str]:
    """Return a recorded trace and what to call it.

    Parameters
    ----------
    source : str
        An embedded model (recorded on the twenty prompts of the fixture where that is not cached), or a file that
        `RoutingTrace.save` wrote.
    progress : callable, optional
        Called with (prompts done, prompts in all) while a model is recorded.

    Raises
    ------
    OptionError
        When there is no such source.
    """
    if source in EMBEDDED:
        rows, stored = fixture_rows(), trace_file(source)
        if not stored.exists():
            from workbench.replay.references import reference_outputs

            prompts, tasks = ([row[name] for row in rows] for name in ("prompt", "task"))
            found = reference_outputs(
                resolve_model(source), prompts, tasks, max_new_tokens=ANSWER_TOKENS, progress=progress
            )
            stored.parent.mkdir(exist_ok=True)
            with whole_file(stored) as scratch:
                found.trace.save(scratch)
        return RoutingTrace.load(stored), f"the embedded model '{source}' on {len(rows)} prompts"
    path = Path(source)
    if not path.is_file():
        raise OptionError(
            f"no routing named {source!r}: give '{OWN}' (random routers), {', '.join(map(repr, EMBEDDED))} or the file "
            f"of a recorded trace (.npz)"
        )
    return RoutingTrace.load(path), f"the trace {path.name}"


def trace_file(source: str) -> Path:
    """Return where the recorded routing of an embedded model rests, whether or not it is there.

    The name says what it was recorded on, so that it can be brought to a machine that has no such model.
    """
    recipe = (RECIPES / EMBEDDED[source] / "recipe.json").read_text(encoding="utf-8")
    content = json.dumps([recipe, fixture_rows(), ANSWER_TOKENS])
    return cache_dir() / "recorded-routing" / f"{source}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.npz"
