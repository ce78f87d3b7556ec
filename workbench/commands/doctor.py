"""``emoe doctor``: what this machine offers, and what to change before measuring on it."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from workbench.commands.options import AsJson
from workbench.progress import progress_bar


def doctor(as_json: AsJson = False) -> None:
    """Look at processor, disk, memory, limits and versions, and advise. Writes at most 256 MiB to the cache's disk."""
    from workbench.machine.doctor import OK, examine
    from workbench.machine.facts import read_machine

    with progress_bar("looking at the machine", "measuring the cache's disk") as progress:
        facts = read_machine(progress)
    findings = examine(facts)
    if as_json:
        typer.echo(
            json.dumps({"findings": [asdict(finding) for finding in findings], "facts": asdict(facts)}, indent=1)
        )
        return
    table = Table()
    for column in ("", "found", "", "advice"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = Text(finding.status, style="green" if finding.status == OK else "yellow")
        table.add_row(finding.name, Text(finding.value), mark, Text(finding.advice))
    Console().print(table)
    warnings = sum(finding.status != OK for finding in findings)
    Console().print(f"{warnings} of {len(findings)} rows with advice." if warnings else "Nothing to advise.")
