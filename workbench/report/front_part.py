"""What comparable runs of a sweep save and what that costs: fronts as figures, and the points as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from workbench.metrics.show import show_number
from workbench.replay.residency import REPLAYED
from workbench.report.files import as_tables
from workbench.report.fronts import hits_front, quality_front, time_front
from workbench.report.pictures import Picture, draw_picture
from workbench.report.points import BOUNDS, judge, points_of
from workbench.report.run_page import RunPage

if TYPE_CHECKING:
    from workbench.tracking.record import RunRecord

HEADINGS = (
    *("expert memory", "memory / stock", "perplexity ratio (95% interval)", "KL (nats/token)", "top-1 agreement"),
    *("time per token / stock", "first token / stock"),
)
MISSING = "–"
TITLES = {
    "quality": "What memory costs in quality",
    "time": "What memory costs in time (beside lossy points: perplexity)",
    "hits": "What a cache of this size can hit, on demand",
}


@dataclass(frozen=True)
class PointRow:
    """A point as the table shows it: its configuration, cells under `HEADINGS`, its run's page."""

    configuration: str
    budget: str
    cells: list[str]
    bound: bool
    on_front: bool
    run: str


@dataclass(frozen=True)
class FrontPart:
    """The points of one notebook, model and stream in a sweep.

    Attributes
    ----------
    missing : list of str
        Bounds that none of these runs measured.
    """

    title: str
    pictures: list[Picture]
    rows: list[PointRow]
    missing: list[str]


def read_points(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Return the operating points of finished runs, judged among those of the same notebook, model and stream."""
    found = as_tables([points_of(record) for record in records if record.status == "FINISHED"])
    if found.empty:
        return found
    return as_tables([judge(group) for _, group in found.groupby(["notebook", "model", "mix"], sort=False)])


def read_fronts(
    points: pd.DataFrame, records: Sequence[RunRecord], pages: Sequence[RunPage], site: Path, name: str
) -> list[FrontPart]:
    """Draw the fronts of a sweep.

    Parameters
    ----------
    points : DataFrame
        Of `read_points`.
    records, pages : sequence
        The runs of the sweep and their pages.
    site : Path
        Folder of the site; figures are drawn into it under names that start with `name`.
    """
    addresses = {page.run_id: page.address for page in pages}
    parts = []
    groups = [] if points.empty else list(points.groupby(["notebook", "model", "mix"], sort=False))
    for number, ((notebook, model, mix), group) in enumerate(groups, start=1):
        own = [record for record in records if record.run_id in set(group["run_id"])]
        drawn = [
            draw_picture(TITLES[kind], draw, site, f"{name}-front-{number}-{kind}")
            for kind, draw in (
                ("quality", partial(quality_front, group)),
                ("time", partial(time_front, group)),
                ("hits", partial(hits_front, hit_curves(own))),
            )
        ]
        pictures = [picture for picture in drawn if picture is not None]
        if not pictures:
            continue
        rows = [_row(row, addresses) for row in group.sort_values("memory_share").to_dict("records")]
        missing = [bound for bound in BOUNDS if bound not in set(group["bound"])]
        parts.append(FrontPart(f"{model}, {mix} mix of tasks ({notebook})", pictures, rows, missing))
    others = [record for record in records if record.status == "FINISHED" and record.table("simulation") is not None]
    for number, record in enumerate(others, start=1):
        curves = hit_curves([record])
        picture = draw_picture(TITLES["hits"], partial(hits_front, curves), site, f"{name}-replay-{number}")
        if picture is not None:
            parts.append(FrontPart(f"{record.params.get('model', '?')} ({record.notebook_name})", [picture], [], []))
    return parts


def hit_curves(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Return hits per lookup of replayed routing: ``policy``, ``slot_share``, ``hit_rate``."""
    rows = []
    for record in records:
        for name, policy in REPLAYED.items():
            rate = record.metrics.get(f"replayed_{name}_hit_rate")
            if rate is not None:
                rows.append({"policy": policy, "slot_share": record.metrics["slot_share"], "hit_rate": rate})
    columns = ["policy", "slot_share", "hit_rate"]
    simulated = [table[columns] for record in records if (table := record.table("simulation")) is not None]
    found = as_tables([pd.DataFrame(rows, columns=columns), *simulated])
    return found if len(found) else pd.DataFrame(columns=columns)


def _row(row: dict[str, object], addresses: dict[str, str]) -> PointRow:
    def number(name: str) -> float | None:
        value = row.get(name)
        return float(value) if isinstance(value, int | float) and value == value else None

    def text(name: str, form: str = "{:.2f}") -> str:
        value = number(name)
        return MISSING if value is None else form.format(value)

    low, high = number("perplexity_ratio_low"), number("perplexity_ratio_high")
    interval = f" ({low:.3f} to {high:.3f})" if low is not None and high is not None and low < high else ""
    nats = number("kl_nats")
    cells = [
        text("memory_share", "{:.0%}"),
        text("memory_ratio"),
        text("perplexity_ratio", "{:.3f}") + interval,
        MISSING if nats is None else show_number(nats),
        text("top1_agreement", "{:.1%}"),
        text("tpot_ratio"),
        text("ttft_ratio"),
    ]
    interval_p = f", p={row['interval']}" if row["interval"] and row["strategy"] != "lru" else ""
    return PointRow(
        configuration=f"{row['configuration']}{interval_p}",
        budget=str(row["budget"]),
        cells=cells,
        bound=bool(row["bound"]),
        on_front=bool(row["on_front"]),
        run=addresses[str(row["run_id"])],
    )
