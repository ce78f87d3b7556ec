"""``emoe serve-cluster``: the server of ``emoe serve``, before engines on a Ray cluster."""

from __future__ import annotations

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
    memory_options,
)
from workbench.commands.serve import (
    BatchOption,
    BodyOption,
    DefaultOutputOption,
    DeviceOption,
    DrainOption,
    DtypeOption,
    HostOption,
    KeyOption,
    KvOption,
    NameOption,
    OutputOption,
    PortOption,
    PromptOption,
    SchedulerOption,
    ToleranceOption,
    WaitingOption,
    announcer,
    read_key,
)
from workbench.extras import require_extra


def serve_cluster(
    model: ModelArgument,
    replicas: Annotated[int, typer.Option(help="Engines, each with its own memory under the budget.")] = 2,
    router: Annotated[str, typer.Option(help="Who gets a request: affinity, least_loaded or round_robin.")] = (
        "affinity"
    ),
    slack: Annotated[
        float, typer.Option(help="Of affinity: how much busier a better fit may be, as a share of a full batch.")
    ] = 0.0,
    ray_address: Annotated[
        str | None, typer.Option(help="HOST:PORT of the Ray cluster; the one this machine is part of if missing.")
    ] = None,
    cpus: Annotated[float, typer.Option(help="CPUs that Ray sets aside for a replica; its threads.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="GPUs, or a share of one, for a replica.")] = 0.0,
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
    """Serve a model from several engines on a Ray cluster, behind one address; options as of `emoe serve`.

    Budget and batch limits are those of each replica. Every node needs the model at the same path.
    """
    require_extra("serve", "serving", "fastapi", "uvicorn", "prometheus_client")
    require_extra("ray", "serving on a cluster", "ray", "grpc")
    from workbench.serving.server.limits import ServerLimits, require_free_port, require_safe_host

    limits = ServerLimits(
        max_body_bytes, max_prompt_tokens, max_output_tokens, default_output_tokens, max_batch, max_waiting
    )
    api_key = read_key(api_key_file)
    require_safe_host(host, api_key)
    require_free_port(host, port)

    from emoe_core.budget import plan_slots
    from emoe_core.checkpoint.index import open_checkpoint
    from emoe_core.scheduler import COSTLESS, BatchLimits, make_scheduler, require_scheduler
    from workbench.machine.ray_connection import code_hash
    from workbench.models.names import resolve_model
    from workbench.serving.costs import conditions
    from workbench.serving.costs.measure import stored_costs
    from workbench.serving.replicas.replica import ReplicaConfig
    from workbench.serving.replicas.service import Placement, running_replicas
    from workbench.serving.server.app import make_app
    from workbench.serving.server.listen import DrainingServer

    placement = Placement(replicas, router, slack, cpus, gpus)
    if device.startswith("cuda") and not gpus:
        raise OptionError(f"--device {device} with --gpus 0 would put all replicas of a node on one GPU: give --gpus 1")
    require_scheduler(scheduler)
    checkpoint = resolve_model(model)
    if Path(checkpoint).is_dir():
        checkpoint = Path(checkpoint).absolute()
    costs = None if scheduler in COSTLESS else stored_costs(checkpoint)
    memory = memory_options(checkpoint, budget, max_quality_loss)
    # Refused here rather than on every node.
    make_scheduler(scheduler, costs)
    BatchLimits(max_batch, kv_tokens)
    index = open_checkpoint(checkpoint, dtype).with_expert_dtype(expert_dtype)
    plan = plan_slots(index, memory["budget"] or "100%")
    called = name or Path(model).name
    engine = {
        "tolerance": tolerance,
        "device": "cpu" if device == "auto" and not gpus else device,
        "dtype": dtype,
        "expert_dtype": expert_dtype,
        **memory,
    }
    config = ReplicaConfig(str(checkpoint), called, engine, scheduler, costs, limits, kv_tokens, code_hash())
    console = Console(stderr=True, highlight=False)

    def tell(sentence: str) -> None:
        console.print(escape(sentence), soft_wrap=True)

    if costs is not None:
        # Of the nodes only that is known which they are told; slots under a quality target are found on each.
        used = conditions.Conditions(
            None if max_quality_loss is not None else tuple(plan.slots_per_layer),
            tolerance,
            str(index.dtype).removeprefix("torch."),
            expert_dtype,
            "cpu" if engine["device"] == "cpu" else "cuda",
            threads=max(1, int(cpus)),
        )
        if told := conditions.warning(costs, used):
            tell(f"Warning: {told}.")
    with running_replicas(config, placement, ray_address, drain_s, tell) as front:
        app = make_app(front, limits, api_key)
        DrainingServer(app, host, port, front.drain, drain_s, on_listening=announcer(console, called, host)).run()
