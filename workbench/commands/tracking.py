"""``emoe tracking-server``: an MLflow server for several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def tracking_server(
    folder: Annotated[
        Path | None,
        typer.Option(help="Keeps database, artifacts and log; mlruns/server when missing.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all, in a network you trust.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    database: Annotated[
        str | None,
        typer.Option(
            help="SQLAlchemy address of a database; a PostgreSQL of its own when missing.", show_default=False
        ),
    ] = None,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            help="Names by which other machines call it, comma-separated; private addresses are always allowed.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that answer.")] = 2,
) -> None:
    """Serve runs and artifacts until interrupted: MLflow on PostgreSQL, without containers.

    Sweeps and notebooks use it with MLFLOW_TRACKING_URI set to its address. It has no accounts.
    """
    from workbench.sweep.run import terminated_like_interrupted
    from workbench.tracking.place import SERVER_VARIABLE, store_dir
    from workbench.tracking.server import ServerConfig, serving

    config = ServerConfig(folder or store_dir() / "server", host, port, database, allowed_hosts, workers)
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"Starting in {config.folder} (the first time takes a while) ...")
    with terminated_like_interrupted(), serving(config) as process:
        console.print(f"Ready: [bold]{config.address}[/]  (Ctrl-C ends it)")
        console.print(f"Use it: [bold]export {SERVER_VARIABLE}={config.address}[/]")
        code = process.wait()
    console.print(f"[red]The server ended by itself[/] (exit code {code}); see {config.folder / 'server.log'}.")
    raise typer.Exit(1)
