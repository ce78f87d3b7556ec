"""``emoe reproduce``: run what the project claims again; and pages whose numbers come from recorded results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from workbench.claims.register import Register, Results
    from workbench.claims.reproduce import Reproduction
    from workbench.claims.verdicts import Verdict


def reproduce(
    claim: Annotated[list[str] | None, typer.Argument(help="Names of claims (--list shows them).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="All claims that take a few minutes.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Show the claims; run nothing.")] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the verdicts beside the results, for the pages.")
    ] = False,
) -> None:
    """Run what the project claims again and say whether it came out the same.

    Each claim rests on recorded runs (results/); these are executed again with their parameters, as `emoe verify` does,
    and the claim's value is compared: the same bits, within the claim's tolerance, or not. Exit code 1 when one is not
    reproduced.
    """
    from emoe_core.errors import OptionError
    from workbench.claims.register import Results, read_register
    from workbench.claims.reproduce import reproduce as run_again
    from workbench.claims.verdicts import read_verdicts, write_verdicts
    from workbench.tracking.store import open_store

    register, results, verdicts = read_register(), Results(), read_verdicts()
    if listed:
        Console(highlight=False).print(_claims(register, results, verdicts))
        return
    if bool(claim) == quick:
        raise OptionError("name claims, or give --quick for those that take minutes; --list shows all of them.")
    names = claim or [name for name, item in register.claims.items() if item.quick]
    if not names:
        raise OptionError(
            "no claim is marked quick, so nothing was run: name one, --list shows them with their minutes."
        )
    chosen = {name: register.claim(name) for name in names}
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    for name, item in chosen.items():
        if item.machine == "quiet":
            screen.print(Text(f"{name} is a matter of time: let this machine do nothing else.", style="yellow"))
    found = run_again(open_store(), chosen, results, lambda text: screen.print(Text(text)))
    Console(highlight=False).print(_outcome(found))
    if record:
        write_verdicts(verdicts | {item.name: item.verdict for item in found})
    raise typer.Exit(0 if all(item.ok for item in found) else 1)


def render(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 if a page would change.")] = False,
) -> None:
    """Write the numbers of README, docs and notebooks anew from recorded results and the register of claims.

    Only what stands between marks is written (`workbench/claims/rendering.py`). Rendering twice changes nothing.
    """
    from workbench.claims.gallery import render_figures
    from workbench.claims.register import Results, read_register
    from workbench.claims.rendering import CLAIMS_PAGE, ROOT, Source, pages, render_pages
    from workbench.claims.verdicts import read_verdicts

    source = Source(read_register(), Results(), read_verdicts())
    changed = render_pages(pages(), source, write=not check)
    changed += render_figures(source.register.figures, source.results, CLAIMS_PAGE.parent, write=not check)
    console = Console(soft_wrap=True, highlight=False)
    for file in changed:
        console.print(f"{'would change' if check else 'rendered'}: {escape(str(file.relative_to(ROOT)))}")
    if not changed:
        console.print("Every number is as the results have it.")
    raise typer.Exit(1 if check and changed else 0)


def _claims(register: Register, results: Results, verdicts: dict[str, Verdict]) -> Table:
    table = Table(title="Claims")
    for heading in ("claim", "recorded", "machine", "minutes", "GB", "quick", "last verdict"):
        table.add_column(heading, justify="right" if heading in ("minutes", "GB") else "left")
    for name, claim in register.claims.items():
        found, verdict = claim.found(results), verdicts.get(name)
        failed = " [red](failed)[/]" if found.verdict == "failed" else ""
        minutes = sum(run.duration_s for run in found.runs) / 60
        table.add_row(
            f"[bold]{escape(name)}[/]\n{escape(found.sentence)}", escape(found.text) + failed, claim.machine,
            f"{minutes:.1f}", f"{claim.gb:g}", "yes" if claim.quick else "", verdict.word if verdict else "–",
        )  # fmt: skip
    for name, item in register.open.items():
        told = f"[bold]{escape(name)}[/]\n{escape(item.says)}"
        table.add_row(told, "open", "", f"{item.minutes:g}", "", "", "–")
    return table


def _outcome(found: list[Reproduction]) -> Table:
    table = Table()
    for heading in ("claim", "recorded", "now", "may differ by", "verdict"):
        table.add_column(heading)
    for item in found:
        claim, verdict = item.found.claim, item.verdict
        now = "–" if verdict.value is None else claim.text(verdict.value)
        word = Text(verdict.word, style="green" if item.ok else "red")
        table.add_row(item.name, escape(item.found.text), now, f"{claim.within:.0%}", word)
    return table
