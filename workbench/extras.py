"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

from emoe_core.errors import OptionError


def require_extra(extra: str, what: str, *packages: str) -> None:
    """Refuse to go on where an extra of this project is not installed.

    Raises
    ------
    OptionError
        That says how to install it.
    """
    if not all(importlib.util.find_spec(package) for package in packages):
        raise OptionError(f"{what} needs the extra '{extra}': pip install -e '.[{extra}]'")
