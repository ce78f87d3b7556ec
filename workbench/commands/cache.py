"""``emoe cache``: what was downloaded or made, all of which can be made again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.commands.groups import command_group

app = command_group("Downloaded packages, built models, packs, prompts: all of it can be made again.")


@app.command("list")
def list_cache() -> None:
    """Show what the cache holds, and how large it is."""
    from emoe_core.loader.cache_folder import cache_dir
    from workbench.metrics.show import show_bytes

    folder = cache_dir()
    table = Table(title=escape(str(folder)))
    table.add_column("entry", overflow="fold")
    table.add_column("size", justify="right")
    sizes = {entry: _size_bytes(entry) for entry in sorted(folder.iterdir())}
    for entry, size in sizes.items():
        table.add_row(escape(entry.name), show_bytes(size))
    table.add_row("[bold]all[/]", f"[bold]{show_bytes(sum(sizes.values()))}[/]")
    Console().print(table)


@app.command("clear")
def clear_cache(yes: Annotated[bool, typer.Option("--yes", help="Clear without asking.")] = False) -> None:
    """Empty the cache."""
    from emoe_core.loader.cache_folder import cache_dir
    from workbench.metrics.show import show_bytes

    folder = cache_dir()
    entries = sorted(folder.iterdir())
    size = show_bytes(sum(map(_size_bytes, entries)))
    if not yes:
        typer.confirm(f"Remove {size} in {folder}?", abort=True)
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    Console().print(f"Removed {size}.")


def _size_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(item.stat().st_size for item in files if item.is_file() and not item.is_symlink())
