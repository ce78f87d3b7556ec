"""Numbers on pages, written from recorded results: marked spans and tables, and the pages that list every claim.

In a page's text, ``<!--KIND NAME-->...<!--/-->`` holds what is rendered; in between stands what was rendered last:

* ``claim NAME``: a claim's value, as a link to its entry on the page of claims;
* ``range NAME``: the range of a claim's runs;
* ``table NAME``, ``figure NAME``: a table or figure of the register, with its data;
* ``recorded SWEEP``: when, by which commit and on what machine a sweep was recorded;
* ``losses MODEL``, ``routing all``: held-out loss of a model that comes along, how the routers of all of them choose;
* ``claims all``, ``open all``, ``artifact all``: every claim, what is still open, and what an evaluator needs to know.

Rendering again changes nothing as long as the results do not; a test says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emoe_core.errors import ExperimentError
from emoe_core.files import write_whole
from workbench.claims.embedded import losses_table, routing_table
from workbench.claims.gallery import shown_figure
from workbench.claims.pooled import pooled_summary
from workbench.claims.register import Column, Found, Register, Results, Rows, has
from workbench.claims.verdicts import Verdict, machine_name
from workbench.metrics.show import markdown_table, show
from workbench.tracking.recorded import RecordedRun

ROOT = Path(__file__).parents[2]
CLAIMS_PAGE = ROOT / "docs" / "results" / "claims.md"
SPAN = re.compile(r"<!--(\w+) ([\w.-]+)-->(.*?)<!--/-->", re.DOTALL)
_MINUTE = 60


@dataclass(frozen=True)
class Source:
    """Where numbers come from: the register, recorded results, and the last verdicts by claim."""

    register: Register
    results: Results
    verdicts: Mapping[str, Verdict]
    _found: dict[str, Found] = field(default_factory=dict, repr=False)

    def found(self, name: str) -> Found:
        """Return what was recorded of a claim; many pages show it, and pooled intervals take a while."""
        if name not in self._found:
            self._found[name] = self.register.claim(name).found(self.results)
        return self._found[name]


def pages(root: Path = ROOT) -> list[Path]:
    """Return the files whose text may hold spans."""
    fixed = [root / "README.md", root / "ARTIFACT.md"]
    found = [*fixed, *sorted((root / "docs").rglob("*.md")), *sorted((root / "notebooks").rglob("*.py"))]
    return [page for page in [*found, *sorted((root / "notebooks").glob("*.ipynb"))] if page.is_file()]


def render_pages(files: Iterable[Path], source: Source, *, write: bool) -> list[Path]:
    """Render pages anew and return those that change.

    Raises
    ------
    ExperimentError
        When a span names what is not in the register, or results are missing.
    """
    changed = []
    for file in files:
        before = file.read_text(encoding="utf-8")
        after = rendered(before, source, file)
        if after != before:
            changed.append(file)
            if write:
                write_whole(file, after)
    return changed


def rendered(text: str, source: Source, file: Path) -> str:
    """Return a page's text with its spans written anew."""

    def one(match: re.Match[str]) -> str:
        kind, name, _ = match.groups()
        if kind not in _KINDS:
            raise ExperimentError(f"{file}: a span of the kind {kind!r} is none of {', '.join(_KINDS)}.")
        try:
            return f"<!--{kind} {name}-->{_KINDS[kind](name, source, file)}<!--/-->"
        except ExperimentError as error:
            raise ExperimentError(f"{file}: {error}") from None

    return SPAN.sub(one, text)


def provenance(runs: Sequence[RecordedRun]) -> str:
    """Return in a line when, by which commit, on what machine and from how many runs results come."""
    days = sorted({_day(run.started_ms) for run in runs}, key=lambda day: datetime.strptime(day, "%d %B %Y"))
    commits = sorted({str(run.environment.get("commit") or "unknown")[:7] for run in runs})
    machines = sorted({_machine(run.environment) for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    noun = "run" if len(runs) == 1 else "runs"
    return f"{len(runs)} {noun}, {when}, commit {', '.join(commits)}, {'; '.join(machines)}"


def _day(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%d %B %Y}".lstrip("0")


def _machine(environment: Mapping[str, Any]) -> str:
    if not environment:
        return "machine unknown"
    gpus = ", ".join(environment.get("gpus") or []) or "no GPU"
    return f"{machine_name(environment)}, {gpus}"


def _claim(name: str, source: Source, file: Path) -> str:
    text = source.found(name).text
    if file.suffix != ".md":
        return text
    page = os.path.relpath(CLAIMS_PAGE, file.parent) if file != CLAIMS_PAGE else ""
    return f"[{text}]({Path(page).as_posix() if page else ''}#{name})"


def _range(name: str, source: Source, file: Path) -> str:
    return source.found(name).range_text


def _table(name: str, source: Source, file: Path) -> str:
    if name not in source.register.tables:
        raise ExperimentError(f"the register has no table {name!r}.")
    rows = source.register.tables[name]
    return f"\n{markdown_table([column.title for column in rows.columns], _cells(rows, source.results))}\n"


def _cells(rows: Rows, results: Results) -> list[list[str]]:
    made: list[list[str]] = []
    runs = rows.runs(results)
    if rows.pooled:
        summary = pooled_summary([run.tables for run in runs], rows.labels)
        return [[_cell(column, row, row) for column in rows.columns] for row in summary.to_dict("records")]
    for run in runs:
        if not rows.table:
            made.append([_cell(column, run.parameters, run.metrics) for column in rows.columns])
            continue
        table = run.tables.get(rows.table)
        if table is None:
            raise ExperimentError(f"the recorded run {run.name!r} has no table {rows.table!r}.")
        made += [
            [_cell(column, run.parameters | group[0], _picked(group, column)) for column in rows.columns]
            for group in _groups([row for row in table.to_dict("records") if has(row, rows.row)], rows.columns)
        ]
    return made


def _groups(rows: list[dict[str, Any]], columns: Sequence[Column]) -> list[list[dict[str, Any]]]:
    """Return the rows of a recorded table that a row of a page is made of: one, or all that differ in ``of`` only."""
    if not any(column.of for column in columns):
        return [[row] for row in rows]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column.param) for column in columns if column.param), []).append(row)
    return list(groups.values())


def _picked(group: list[dict[str, Any]], column: Column) -> dict[str, Any]:
    return next((row for row in group if has(row, column.of)), {})


def _cell(column: Column, params: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    if column.param:
        text = str(params.get(column.param, "–"))
        return column.named.get(text, text)
    value = metrics.get(column.metric)
    if value is None or value != value:
        return "–"
    shown = _shown(column, value)
    low, high = (metrics.get(f"{column.metric}{end}") for end in ("_low", "_high"))
    if column.interval and low is not None and high is not None and low == low and low != high:
        return f"{shown} ({_shown(column, low)} to {_shown(column, high)})"
    return shown


def _shown(column: Column, value: float) -> str:
    return format(value, column.shown) if column.shown else show(column.metric, value)


def _figure(name: str, source: Source, file: Path) -> str:
    if name not in source.register.figures:
        raise ExperimentError(f"the register has no figure {name!r}.")
    item = source.register.figures[name]
    return f"\n{shown_figure(name, item)}: {provenance(item.runs(source.results))}\n"


def _recorded(name: str, source: Source, file: Path) -> str:
    return provenance(source.results(name).runs)


def _losses(name: str, source: Source, file: Path) -> str:
    return f"\n{losses_table(name)}\n"


def _routing(name: str, source: Source, file: Path) -> str:
    return f"\n{routing_table()}\n"


def _claims(name: str, source: Source, file: Path) -> str:
    parts = [_entry(claim, source.found(claim), source) for claim in source.register.claims]
    return "\n\n" + "\n\n".join(parts) + "\n\n"


def _entry(name: str, found: Found, source: Source) -> str:
    claim = found.claim
    holds = {"holds": f" Claimed: {claim.holds}; it holds.", "failed": f" Claimed: {claim.holds}; **it failed.**"}
    scattered = "95% interval over prompts" if claim.pooled or len(found.runs) == 1 else "Range over runs"
    spread = f" {scattered}: {found.range_text}." if found.range_text else ""
    verdict = source.verdicts.get(name)
    settings = ", ".join(f"{key} {value}" for key, value in claim.where.items())
    runs = ", ".join(f"`{run.run_id[:8]}`" for run in found.runs)
    lines = [
        f'<a id="{name}"></a>\n### {name}',
        f"{found.sentence}{spread}{holds.get(found.verdict, '')}",
        f"- {claim.source}, {'run' if len(found.runs) == 1 else 'runs'} {runs} of sweep `{claim.sweep}`"
        f"{f' ({settings})' if settings else ''}: {provenance(found.runs)}",
        f"- again: `emoe reproduce {name}`; about {_minutes(found)} and {claim.gb:g} GB of disk; a rerun may differ by "
        f"{claim.within:.0%}{_needs(claim.machine)}",
        f"- last verdict: {verdict.sentence(claim.text) if verdict else 'not run again yet'}",
    ]
    return f"{lines[0]}\n\n{lines[1]}\n\n" + "\n".join(lines[2:])


def _needs(machine: str) -> str:
    return {"quiet": " on a quiet machine", "gpu": " on a GPU", "any": ""}[machine]


def _minutes(found: Found) -> str:
    minutes = sum(run.duration_s for run in found.runs) / _MINUTE
    return f"{max(1, round(minutes))} min"


def _open(name: str, source: Source, file: Path) -> str:
    rows = [[item.says, f"`{item.command}`", f"{item.minutes:g}"] for item in source.register.open.values()]
    return (
        f"\n{markdown_table(['question', 'command', 'minutes, 2 cores'], rows)}\n" if rows else "\nNothing is open.\n"
    )


def _artifact(name: str, source: Source, file: Path) -> str:
    rows = []
    for name, claim in source.register.claims.items():
        found, verdict = source.found(name), source.verdicts.get(name)
        rows.append(
            [f"[{name}](docs/results/claims.md#{name})", found.sentence, f"±{claim.within:.0%}",
             {"any": "any CPU", "quiet": "quiet CPU", "gpu": "a GPU"}[claim.machine], _minutes(found), f"{claim.gb:g}",
             "yes" if claim.quick else "", verdict.word if verdict else "–"]
        )  # fmt: skip
    heads = ["claim", "expected", "a rerun may differ by", "machine", "time", "GB", "quick", "last verdict"]
    return f"\n{markdown_table(heads, rows)}\n"


_KINDS: dict[str, Callable[[str, Source, Path], str]] = {
    "claim": _claim,
    "range": _range,
    "table": _table,
    "figure": _figure,
    "recorded": _recorded,
    "losses": _losses,
    "routing": _routing,
    "claims": _claims,
    "open": _open,
    "artifact": _artifact,
}
