"""What the documentation site generates while it is built: the command line's reference, and formulas.

MkDocs calls the functions that are named after its events. Formulas are ```` ```math ```` fences in TeX, which GitHub
shows as they are; here they become MathML, which browsers draw without a script.
"""

from __future__ import annotations

from typing import Any

import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from workbench.models.reference import RECIPES

CLI_PAGE = "reference/cli.md"
# A picture that the reference model's evaluation draws beside its recipe.
ROUTING = "upcycled/routing.png"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Draw ``math`` fences as formulas."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "formula", "format": formula}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the command line's reference, as Typer writes it, and the picture of the reference model's routing."""
    files.append(File.generated(config, CLI_PAGE, content=command_reference()))
    files.append(File.generated(config, "routing.png", abs_src_path=str(RECIPES / ROUTING)))
    return files


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **given: Any) -> str:
    """Return TeX as MathML."""
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'


def command_reference() -> str:
    """Return every command with its arguments and options, in Markdown."""
    from workbench.cli import app

    command = typer.main.get_command(app)
    _tell_whole_sentences(command)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="emoe", title="Command line")
    return str(text)


def _tell_whole_sentences(command: Any) -> None:
    """Have lists of commands show the first line of each one's help; they would be cut at 45 characters."""
    for part in getattr(command, "commands", {}).values():
        part.short_help = part.help.splitlines()[0]
        _tell_whole_sentences(part)
