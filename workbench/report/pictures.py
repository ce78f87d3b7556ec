"""Figures of the site: each is drawn twice, for light and for dark pages; images that a run recorded are copied.

Figures are SVG with outlines in place of text, so that they look the same wherever the folder is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from workbench.tracking.store_errors import store_errors

INK = {"light": "#1c2128", "dark": "#e4e8ed"}
GRID = {"light": "#d9dde3", "dark": "#363e48"}
# Wider than this (inches) a figure keeps its size on a phone and is scrolled.
READABLE_INCHES = 6.0

Draw = Callable[[], Figure | None]


@dataclass(frozen=True)
class Picture:
    """An image of a page.

    Attributes
    ----------
    title : str
    light, dark : str
        Addresses relative to the site's folder; `dark` is empty for an image that a run recorded, which is shown on
        white.
    wide : bool
        Whether a phone shows a part of it and scrolls.
    """

    title: str
    light: str
    dark: str = ""
    wide: bool = False


def draw_picture(title: str, draw: Draw, site: Path, name: str) -> Picture | None:
    """Draw a figure into the site's ``figures`` for both grounds; None when there is nothing to draw.

    Parameters
    ----------
    title : str
    draw : callable
        Returns a new figure at each call, or None.
    site : Path
        Folder of the site.
    name : str
        File name without extension.
    """
    wide = False
    for ground in INK:
        with mpl.rc_context(_look(ground)):
            figure = draw()
            if figure is None:
                return None
            wide = figure.get_size_inches()[0] > READABLE_INCHES
            path = site / "figures" / f"{name}-{ground}.svg"
            with store_errors():
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    return Picture(title, f"figures/{name}-light.svg", f"figures/{name}-dark.svg", wide)


def _look(ground: str) -> Any:
    ink, grid = INK[ground], GRID[ground]
    colors = {"text.color": ink, "axes.labelcolor": ink, "axes.titlecolor": ink, "xtick.color": ink, "ytick.color": ink}
    lines = {"axes.edgecolor": grid, "grid.color": grid, "legend.labelcolor": ink}
    grounds = {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
    return colors | lines | grounds | {"svg.fonttype": "path", "svg.hashsalt": "emoe"}
