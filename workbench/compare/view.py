"""A comparison laid out in tables, the same for a terminal and for a page."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.compare.differences import Difference
from workbench.compare.runs import RunComparison
from workbench.compare.sweeps import SweepComparison
from workbench.compare.texts import HEADINGS, ChangeRow, change_rows
from workbench.report.page import render_page

HOW_TO_READ = (
    "Intervals are 95% bootstrap intervals over pairs; of twenty metrics one differs by chance.",
    "(doubtful): something beside the parameters differs that may have moved it.",
)
ONE_VALUE = "Single values show no noise: run again, or compare sweeps, before believing them."


@dataclass(frozen=True)
class View:
    """What is shown of a comparison.

    Attributes
    ----------
    a, b : str
        What is compared.
    parameters, others : list of (Difference, int)
        With the number of pairs; 0 where there is one pair only.
    tables : list of (title, rows)
    remarks : list of str
    """

    a: str
    b: str
    parameters: list[tuple[Difference, int]]
    others: list[tuple[Difference, int]]
    tables: list[tuple[str, list[ChangeRow]]]
    remarks: list[str]

    def page(self) -> str:
        """Return the comparison as an HTML page that stands alone."""
        return render_page("compare.html.j2", **vars(self), headings=HEADINGS)


def view_runs(found: RunComparison) -> View:
    """Lay out two runs."""
    tables = []
    if found.over_prompts:
        pairs = max(change.pairs for change in found.over_prompts)
        tables.append((f"Paired over {pairs} prompts, means per prompt", change_rows(found.over_prompts, found.others)))
    if found.single:
        tables.append(("One value a run", change_rows(found.single, found.others)))
    return View(
        f"run {found.a.describe()}",
        f"run {found.b.describe()}",
        [(item, 0) for item in found.parameters],
        [(item, 0) for item in found.others],
        tables,
        [*found.remarks, *([ONE_VALUE] if found.single else []), *HOW_TO_READ],
    )


def view_sweeps(found: SweepComparison) -> View:
    """Lay out two sweeps: the changes over pairs, then the metrics that matter of each pair."""
    tables = []
    for notebook, changes in found.notebooks.items():
        pairs = sum(pair.a.notebook_name == notebook for pair in found.pairs)
        tables.append(
            (f"{notebook}: over {pairs} pairs of runs", change_rows(changes, (item for item, _ in found.others)))
        )
    tables += [(pair.a.name, change_rows(found.main_metrics(pair), pair.others)) for pair in found.pairs]
    left = [f"Without a partner: {line}." for line in found.unpaired]
    remarks = list(dict.fromkeys(remark for pair in found.pairs for remark in pair.remarks))
    return View(found.a.title, found.b.title, found.parameters, found.others, tables, [*left, *remarks, *HOW_TO_READ])
