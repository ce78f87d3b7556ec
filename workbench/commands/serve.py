"""``emoe serve``: an OpenAI-compatible server under a memory budget."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from emoe_core.errors import OptionError
from workbench.commands.checkpoints import (
    BudgetOption,
    ExpertDtypeOption,
    ModelArgument,
    QualityOption,
    open_engine,
)
from workbench.extras import require_extra

KEY_VARIABLE = "EMOE_API_KEY"


ToleranceOption = Annotated[float, typer.Option(help="Where a request brings none: 0 is exact.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on; another than loopback needs a key.")]
PortOption = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
KeyOption = Annotated[
    Path | None, typer.Option(help=f"File with the key that clients must send; or set {KEY_VARIABLE}.")
]
NameOption = Annotated[str | None, typer.Option(help="Model name for clients; MODEL's last part if missing.")]
SchedulerOption = Annotated[str, typer.Option(help="fcfs, edf, affine; by costs: shortest, emoe, emoe_no_loading.")]
BatchOption = Annotated[int, typer.Option(help="Requests that run at once in an engine.")]
WaitingOption = Annotated[int, typer.Option(help="Requests that may wait beside them; more get 429.")]
KvOption = Annotated[int, typer.Option(help="Tokens of KV cache, prompts and answers of all that run in an engine.")]
PromptOption = Annotated[int, typer.Option(help="Longest prompt.")]
OutputOption = Annotated[int, typer.Option(help="Longest answer.")]
DefaultOutputOption = Annotated[int, typer.Option(help="Longest answer where a request does not say.")]
BodyOption = Annotated[int, typer.Option(help="Largest request body.")]
DrainOption = Annotated[float, typer.Option(help="Seconds that running requests may take after SIGTERM.")]
DeviceOption = Annotated[str, typer.Option(help="'auto', 'cpu' or 'cuda'.")]
DtypeOption = Annotated[str, typer.Option(help="'auto' (the checkpoint's), 'float32' or 'bfloat16'.")]


def serve(
    model: ModelArgument,
    budget: BudgetOption = None,
    max_quality_loss: QualityOption = None,
    tolerance: ToleranceOption = 0.0,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key_file: KeyOption = None,
    name: NameOption = None,
    scheduler: SchedulerOption = "fcfs",
    max_batch: BatchOption = 4,
    max_waiting: WaitingOption = 64,
    kv_tokens: KvOption = 16384,
    max_prompt_tokens: PromptOption = 4096,
    max_output_tokens: OutputOption = 1024,
    default_output_tokens: DefaultOutputOption = 128,
    max_body_bytes: BodyOption = 1_000_000,
    drain_s: DrainOption = 30.0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    expert_dtype: ExpertDtypeOption = "auto",
) -> None:
    """Serve a model to OpenAI clients: /v1/completions and /v1/chat/completions, metrics at /metrics."""
    require_extra("serve", "serving", "fastapi", "uvicorn", "prometheus_client")
    from workbench.serving.server.limits import ServerLimits, require_free_port, require_safe_host

    limits = ServerLimits(
        max_body_bytes, max_prompt_tokens, max_output_tokens, default_output_tokens, max_batch, max_waiting
    )
    api_key = read_key(api_key_file)
    require_safe_host(host, api_key)
    require_free_port(host, port)

    from emoe_core.scheduler import COSTLESS, BatchLimits, make_scheduler, require_scheduler
    from workbench.models.names import resolve_model
    from workbench.serving.costs import conditions
    from workbench.serving.costs.measure import stored_costs
    from workbench.serving.server.listen import EmoeServer

    require_scheduler(scheduler)
    checkpoint = resolve_model(model)
    batch = BatchLimits(max_batch, kv_tokens)
    costs = None if scheduler in COSTLESS else stored_costs(checkpoint)
    chosen = make_scheduler(scheduler, costs)
    console = Console(stderr=True, highlight=False)
    called = name or Path(model).name
    options = {"tolerance": tolerance, "device": device, "dtype": dtype, "expert_dtype": expert_dtype}
    with open_engine(checkpoint, budget, max_quality_loss, console, **options) as engine:
        if costs is not None and (told := conditions.warning(costs, conditions.conditions_here(engine))):
            console.print(f"[yellow]Warning: {escape(told)}.[/]", soft_wrap=True)
        say = announcer(console, called, host)
        EmoeServer(
            engine, chosen, limits, batch, called, host, port, api_key, costs, drain_s, on_listening=say
        ).run_until_stopped()


def announcer(console: Console, name: str, host: str) -> Callable[[int], None]:
    """Return what tells people the port that was taken."""

    def say(taken: int) -> None:
        # On a line of its own for those who start servers by program.
        console.print(f"Serving {escape(name)} at http://{host}:{taken}/v1", soft_wrap=True)

    return say


def read_key(path: Path | None) -> str | None:
    """Return the key of a file, else of the environment, else None; `OptionError` when it is empty."""
    if path is None:
        key = os.environ.get(KEY_VARIABLE)
        source = KEY_VARIABLE
    else:
        source = str(path)
        try:
            key = path.read_text(encoding="utf-8")
        except OSError as error:
            raise OptionError(f"--api-key-file {path} cannot be read: {error.strerror}") from error
    if key is not None and not key.strip():
        raise OptionError(f"the API key of {source} is empty: write one, or leave it out")
    return None if key is None else key.strip()
