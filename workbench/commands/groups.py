"""Groups of commands, and the names that commands had before.

An old name says what it is now called and does nothing, so that scripts are mended rather than half working. The table
holds for one release.
"""

from __future__ import annotations

import inspect
from typing import Any

import typer
from typer.core import TyperGroup

from emoe_core.errors import OptionError

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
# Old names in full, and what to type instead.
RENAMED = {
    "bench-systems": "emoe bench --list-systems",
    "costs": "emoe model costs",
    "data classify": "python scripts/classify_tasks.py",
    "evaluate-predictors": "emoe predictor evaluate",
    "model evaluate": "python scripts/evaluate_reference.py",
    "model train": "python scripts/train_reference.py",
    "model verify": "emoe model check",
    "models": "emoe model families",
    "pack": "emoe model pack",
    "profile": "emoe model profile",
    "serve-cluster": "emoe serve --replicas N",
    "simulate": "emoe simulate cache",
    "simulate-serving": "emoe simulate serving",
    "soak": "python -m pytest -m long tests/bench/serving/test_soak.py",
    "tracking-server": "mlflow server",
    "train-predictor": "emoe predictor train",
}


class RenamedCommands(TyperGroup):
    """A group that knows the old names of commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name.

        Raises
        ------
        OptionError
            When they name it as an earlier release did.
        """
        if args[0] not in self.commands:
            group = " ".join(ctx.command_path.split()[1:])
            for old in (f"{group} {args[0]}".strip(), group):
                if old in RENAMED:
                    raise OptionError(f"`emoe {old}` is now `{RENAMED[old]}`.")
        return super().resolve_command(ctx, args)


def flowing(text: str | None) -> str:
    """Return a docstring with each paragraph on one line, for a terminal to break."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n"))


def command_group(help: str, **options: Any) -> typer.Typer:
    """Return a group that shows its help where no command follows."""
    return typer.Typer(
        cls=RenamedCommands,
        help=help,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings=HELP_OPTIONS,
        **options,
    )
