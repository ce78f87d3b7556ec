"""``emoe serve``: an OpenAI-compatible server under a memory budget, of one engine or of several on a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from emoe_core.errors import OptionError
from workbench.commands.engine import memory_options, open_engine
from workbench.commands.options import (
    LIMITS_PANEL,
    Budget,
    Device,
    Dtype,
    ExpertDtype,
    KvTokens,
    MaxBatch,
    MaxQualityLoss,
    Model,
    OnMiss,
    PredictorName,
    RayAddress,
    RouterName,
    SchedulerName,
    Tolerance,
)
from workbench.extras import require_extra

if TYPE_CHECKING:
    from emoe_core.scheduler.costs import ServingCosts
    from workbench.serving.replicas.service import Placement
    from workbench.serving.server.limits import ServerLimits

KEY_VARIABLE = "EMOE_API_KEY"
REPLICAS_PANEL = "With --replicas"
# They mean nothing to a single engine.
REPLICA_OPTIONS = ("router", "slack", "ray_address", "cpus", "gpus")


@dataclass(frozen=True)
class Service:
    """What is served, to whom, and within what limits; `memory` and `load` are options of `emoe_core.load`."""

    model: str
    name: str
    host: str
    port: int
    api_key: str | None
    scheduler: str
    costs: ServingCosts | None
    limits: ServerLimits
    kv_tokens: int
    drain_s: float
    budget: str | None
    max_quality_loss: float | None
    load: dict[str, Any]
    console: Console

    def say_address(self, port: int) -> None:
        """Tell people where it is served, on a line of its own for those who start servers by program."""
        self.say(f"Serving {self.name} at http://{self.host}:{port}/v1")

    def say_stopping(self) -> None:
        """Tell people what the first Ctrl-C does."""
        self.say(f"Stopping: running requests may take {self.drain_s:g} s more; Ctrl-C again stops at once.")

    def say(self, sentence: str) -> None:
        """Print a line on stderr."""
        self.console.print(escape(sentence), soft_wrap=True)


def serve(
    context: typer.Context,
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the key that clients must send; or set {KEY_VARIABLE}.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Model name for clients; MODEL's last part if not given.")] = None,
    scheduler: SchedulerName = "fcfs",
    drain_s: Annotated[float, typer.Option(help="Seconds that running requests may take after SIGTERM.")] = 30.0,
    budget: Budget = None,
    max_quality_loss: MaxQualityLoss = None,
    tolerance: Tolerance = 0.0,
    on_miss: OnMiss = "reroute",
    predictor: PredictorName = "frequency",
    device: Device = "auto",
    dtype: Dtype = "auto",
    expert_dtype: ExpertDtype = "auto",
    max_batch: MaxBatch = 4,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait beside them; more get 429.", rich_help_panel=LIMITS_PANEL)
    ] = 64,
    kv_tokens: KvTokens = 16384,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longest prompt.", rich_help_panel=LIMITS_PANEL)] = 4096,
    max_output_tokens: Annotated[int, typer.Option(help="Longest answer.", rich_help_panel=LIMITS_PANEL)] = 1024,
    default_output_tokens: Annotated[
        int, typer.Option(help="Longest answer where a request does not say.", rich_help_panel=LIMITS_PANEL)
    ] = 128,
    max_body_bytes: Annotated[
        int, typer.Option(help="Largest request body.", rich_help_panel=LIMITS_PANEL)
    ] = 1_000_000,
    replicas: Annotated[
        int | None,
        typer.Option(
            help="Engines on a Ray cluster, behind one address, each with its own memory under the budget; one engine "
            "in this process, without Ray, if not given."
        ),
    ] = None,
    router: Annotated[
        RouterName, typer.Option(help="Which replica gets a request.", rich_help_panel=REPLICAS_PANEL)
    ] = "affinity",
    slack: Annotated[
        float,
        typer.Option(
            help="Of affinity: how much busier a better fit may be, as a share of a full batch.",
            rich_help_panel=REPLICAS_PANEL,
        ),
    ] = 0.0,
    ray_address: RayAddress = None,
    cpus: Annotated[
        float,
        typer.Option(help="CPUs that Ray sets aside for a replica; its threads.", rich_help_panel=REPLICAS_PANEL),
    ] = 1.0,
    gpus: Annotated[
        float, typer.Option(help="GPUs, or a share of one, for a replica.", rich_help_panel=REPLICAS_PANEL)
    ] = 0.0,
) -> None:
    """Serve a model to OpenAI clients: /v1/completions and /v1/chat/completions, metrics at /metrics.

    A request may bring a tolerance of its own. With --replicas, budget and batch limits are those of each replica, and
    every node needs the model at the same path.
    """
    require_extra("serve", "serving", "fastapi", "uvicorn", "prometheus_client")
    placement = None
    if replicas is not None:
        require_extra("ray", "serving on a cluster", "ray", "grpc")
        from workbench.serving.replicas.service import Placement

        placement = Placement(replicas, router, slack, cpus, gpus)
        if device.startswith("cuda") and not gpus:
            raise OptionError(
                f"--device {device} with --gpus 0 would put all replicas of a node on one GPU: give --gpus 1"
            )
    else:
        _refuse_replica_options(context)
    from workbench.serving.server.limits import ServerLimits, require_free_port, require_safe_host

    limits = ServerLimits(
        max_body_bytes, max_prompt_tokens, max_output_tokens, default_output_tokens, max_batch, max_waiting
    )
    api_key = read_key(api_key_file)
    require_safe_host(host, api_key)
    require_free_port(host, port)

    from workbench.models.names import require_model
    from workbench.serving.costs.measure import stored_costs
    from workbench.serving.orders import COSTLESS

    require_model(model)
    service = Service(
        model,
        name or Path(model).name,
        host,
        port,
        api_key,
        scheduler,
        None if scheduler in COSTLESS else stored_costs(model),
        limits,
        kv_tokens,
        drain_s,
        budget,
        max_quality_loss,
        {
            "tolerance": tolerance,
            "on_miss": on_miss,
            "predictor": predictor,
            "device": device,
            "dtype": dtype,
            "expert_dtype": expert_dtype,
        },
        Console(stderr=True, highlight=False),
    )
    if placement is None:
        _serve_here(service)
    else:
        _serve_replicas(service, placement, ray_address)
    service.say("Stopped.")


def _refuse_replica_options(context: typer.Context) -> None:
    for name in REPLICA_OPTIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise OptionError(f"--{name.replace('_', '-')} goes with --replicas.")


def _serve_here(service: Service) -> None:
    """Serve with one engine, in this process."""
    from emoe_core.scheduler import BatchLimits
    from workbench.serving.costs import conditions
    from workbench.serving.orders import make_scheduler
    from workbench.serving.server.listen import EmoeServer

    batch = BatchLimits(service.limits.max_batch, service.kv_tokens)
    scheduler, costs = make_scheduler(service.scheduler, service.costs), service.costs
    with open_engine(
        service.model, service.budget, service.max_quality_loss, service.console, **service.load
    ) as engine:
        if costs is not None and (told := conditions.warning(costs, conditions.conditions_here(engine))):
            service.console.print(f"[yellow]Warning: {escape(told)}.[/]", soft_wrap=True)
        EmoeServer(
            engine, scheduler, service.limits, batch, service.name, service.host, service.port, service.api_key, costs,
            service.drain_s, on_listening=service.say_address, on_stopping=service.say_stopping,
        ).run_until_stopped()  # fmt: skip


def _serve_replicas(service: Service, placement: Placement, ray_address: str | None) -> None:
    """Serve with engines on a Ray cluster; this process is their front."""
    from emoe_core.budget import plan_slots
    from emoe_core.checkpoint.index import open_checkpoint
    from emoe_core.scheduler import BatchLimits
    from workbench.machine.environment import code_hash
    from workbench.models.names import resolve_model
    from workbench.serving.costs import conditions
    from workbench.serving.orders import make_scheduler
    from workbench.serving.replicas.replica import ReplicaConfig
    from workbench.serving.replicas.service import running_replicas
    from workbench.serving.server.app import make_app
    from workbench.serving.server.listen import DrainingServer

    checkpoint = resolve_model(service.model)
    if Path(checkpoint).is_dir():
        checkpoint = Path(checkpoint).absolute()
    costs, load = service.costs, service.load
    memory = memory_options(service.model, service.budget, service.max_quality_loss)
    # Refused here rather than on every node.
    make_scheduler(service.scheduler, costs)
    BatchLimits(service.limits.max_batch, service.kv_tokens)
    index = open_checkpoint(checkpoint, load["dtype"]).with_expert_dtype(load["expert_dtype"])
    plan = plan_slots(index, memory["budget"] or "100%")
    device = "cpu" if load["device"] == "auto" and not placement.gpus else load["device"]
    config = ReplicaConfig(
        str(checkpoint), service.name, {**load, "device": device, **memory}, service.scheduler, costs, service.limits,
        service.kv_tokens, code_hash(),
    )  # fmt: skip
    if costs is not None:
        # Of the nodes only that is known which they are told; slots under a quality target are found on each.
        used = conditions.Conditions(
            None if service.max_quality_loss is not None else tuple(plan.slots_per_layer),
            load["tolerance"],
            str(index.dtype).removeprefix("torch."),
            load["expert_dtype"],
            "cpu" if device == "cpu" else "cuda",
            threads=max(1, int(placement.cpus)),
        )
        if told := conditions.warning(costs, used):
            service.say(f"Warning: {told}.")
    with running_replicas(config, placement, ray_address, service.drain_s, service.say) as front:
        DrainingServer(
            make_app(front, service.limits, service.api_key), service.host, service.port, front.drain, service.drain_s,
            on_listening=service.say_address, on_stopping=service.say_stopping,
        ).run()  # fmt: skip


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
