"""``emoe model``: checkpoints that come along or are synthetic, and what is known of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from emoe_core.errors import OptionError
from workbench.commands import families, measured, synthetic
from workbench.commands.groups import command_group
from workbench.commands.options import Dtype, Model, OutFile, OutFolder
from workbench.progress import progress_bar

EmbeddedModel = Annotated[
    Literal["reference", "carved", "native"], typer.Argument(help="Which of the models that come along.")
]

app = command_group("Models that come along, synthetic ones, and what is known of a model.")


@app.command("build")
def build(model: EmbeddedModel = "reference", out: OutFolder = None) -> None:
    """Build a reference model from its recipe (under two minutes, once)."""
    from workbench.models import reference

    built = reference.build(out, kind=reference.EMBEDDED[model])
    Console().print(f"Reference model: [bold]{escape(str(built))}[/]", soft_wrap=True)


@app.command("check")
def check(
    model: EmbeddedModel = "reference",
    path: Annotated[Path | None, typer.Option(help="Folder of the built model; the cache's if not given.")] = None,
) -> None:
    """Check the built model's files against their checksums."""
    from workbench.models import reference

    Console().print(f"Intact: all {len(reference.verify(path, reference.EMBEDDED[model]))} files.")


@app.command("pack")
def pack(
    model: Model,
    out: OutFile = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every expert back and compare its checksum.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write the pack again even if there is one.")] = False,
    dtype: Dtype = "auto",
) -> None:
    """Write a checkpoint's experts into one file that they are read from quickly."""
    if out is not None and out.is_dir():
        raise OptionError(f"--out {out} is a folder: name the file to write, such as {out / 'experts.emoe'}")
    from emoe_core.checkpoint.index import open_checkpoint
    from emoe_core.loader.cache_folder import cache_dir
    from emoe_core.loader.pack import Pack, ensure_pack, write_pack
    from workbench.metrics.show import show_bytes
    from workbench.models.names import resolve_model

    index = open_checkpoint(resolve_model(model), dtype)
    with progress_bar("writing experts") as progress:
        if out is not None:
            if force or not out.exists():
                write_pack(index, out, progress)
            made = Pack.open(out, index)
        else:
            made = ensure_pack(index, cache_dir() / "packs", progress)
            if force:
                made = Pack.open(write_pack(index, made.path, progress), index)
    if verify:
        with progress_bar("verifying experts") as progress:
            made.verify(progress)
    checked = ", every checksum verified" if verify else ""
    Console().print(f"Pack: [bold]{escape(str(made.path))}[/] ({show_bytes(made.file_bytes)}{checked})", soft_wrap=True)


app.command("synth")(synthetic.synth)
app.command("families")(families.families)
app.command("profile")(measured.profile)
app.command("costs")(measured.costs)
