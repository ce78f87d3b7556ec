"""Reading YAML files that others may have written.

Only plain data is understood: no tags that make objects, and no aliases, since a few nested ones stand for more data
than any memory holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from emoe_core.errors import ExperimentError

MAX_BYTES = 1 << 16


class _PlainLoader(yaml.SafeLoader):
    """The safe loader without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"alias *{event.anchor}: write it out", event.start_mark)
        found: yaml.Node | None = super().compose_node(parent, index)
        return found


def read_yaml(path: Path) -> Any:
    """Return what a YAML file says.

    Raises
    ------
    ExperimentError
        When the file cannot be read, is not YAML, is longer than `MAX_BYTES`, or uses an alias.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ExperimentError(f"{path} is longer than {MAX_BYTES:,} bytes: no sweep file is. Check the path.")
        # A loader of plain data: see above.
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except ExperimentError:
        raise
    except Exception as error:  # ill-formed dates, numbers and depths raise several types beside YAMLError
        raise ExperimentError(f"{path} is not YAML: {error or type(error).__name__}") from None
