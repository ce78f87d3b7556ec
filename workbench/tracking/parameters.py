"""A notebook's parameters while it runs: each name is written once, in the cell tagged ``parameters``.

`workbench.tracking.notebook` reads the same cell from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

SCALARS = (bool, int, float, str, type(None))
Config = TypeVar("Config")


def parameters_of(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters in a notebook's ``globals()``; call it first, before other cells assign scalars.

    A cell that is run again finds the names in its own ``parameters`` and only reads their values anew.
    """
    names = namespace.get("parameters", namespace)
    found = {name: namespace[name] for name in names if not name.startswith("_")}
    return {name: value for name, value in found.items() if isinstance(value, SCALARS)}


def config_from(kind: type[Config], parameters: Mapping[str, Any], **given: Any) -> Config:
    """Return a configuration whose fields are the parameters of the same names; ``given`` ones count before them.

    Parameters
    ----------
    kind : type
        A dataclass: `ExperimentConfig`, `RecordingConfig`, `ServingConfig`, ...
    parameters : mapping of str to scalar
        Those that are no fields are left out.
    **given
        Fields that are no parameters, or whose parameter is text that stands for something else.
    """
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in parameters.items() if name in known} | given)


def listed(text: str | float) -> list[str]:
    """Return the items of a comma-separated parameter; papermill makes a number of a single one."""
    return [item.strip() for item in str(text).split(",") if item.strip()]
