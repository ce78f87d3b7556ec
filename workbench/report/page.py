"""HTML pages from templates: they stand alone, and text from the store is escaped."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.tracking.store_errors import store_errors


def render_page(template: str, **values: Any) -> str:
    """Return a page; its template also gets ``written``, the time."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("workbench.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(written=f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}", **values)


def write_page(out: Path, page: str) -> Path:
    """Write a page, its folder made if missing, and return its path."""
    with store_errors():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    return out
