"""Is the simulation right? The same arrivals through the real loop, in real time, and through the simulation.

The engine is loaded as `measure` loads it (tolerance 1, so experts move between steps), answers a prompt of every task
so that nothing is cold, and has its times measured there and then, if wanted: what is judged is the simulation, not how
much a machine has changed since costs were stored. Then every scheduler serves the same requests. Prompts are real ones
of each task, repeated or cut to the length that was drawn; answers have the length that was drawn, whatever is said.

A second simulation goes by times fitted to the real loop's own passes ("refitted"): what it misses is the simulation's
fault, what only the first one misses is the costs', since a machine is not as fast in one minute as in the next, and
near saturation a tenth more work is a third more waiting.

Percentiles of few requests are what they are: the P99 of 30 is close to the slowest one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd

import emoe_core
from emoe_core.errors import OptionError
from emoe_core.scheduler import BatchLimits, Objective, Request
from emoe_core.scheduler.costs import ServingCosts
from emoe_core.serving.loop import ServingLoop
from emoe_core.serving.records import Answer, Pass
from workbench.machine.busy import OtherWork
from workbench.models.names import resolve_model
from workbench.serving.checks.agreement import compare, parts_of
from workbench.serving.costs import conditions
from workbench.serving.costs.task_loads import cut, task_tokens
from workbench.serving.costs.times import Times, fitted, measure_times
from workbench.serving.orders import make_scheduler
from workbench.serving.simulation.arrivals import Arrival
from workbench.serving.simulation.cluster import Cluster
from workbench.serving.simulation.experiment import (
    ServingConfig,
    cut_arrivals,
    make_replica,
    make_request,
    objectives,
)
from workbench.serving.simulation.service_metrics import request_table
from workbench.serving.simulation.simulated_engine import Served

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ValidationConfig:
    """What is served twice.

    Attributes
    ----------
    model : str
    budget : str
        Without ``remeasure``, the one that the costs were measured under.
    schedulers : tuple of str
    load : float
        Mean rate as a share of capacity.
    n_requests : int
    max_batch : int
    max_input_tokens, max_output_tokens : int
        Longer prompts and answers are cut.
    interval : int
    remeasure : bool
        Measure times on this engine first. False takes the stored ones as they are.
    repeats : int
        Of these measurements.
    source, dtype, device, seed
        As in `ExperimentConfig`.
    """

    model: str = "reference"
    budget: str = "60%"
    schedulers: tuple[str, ...] = ("fcfs", "emoe")
    load: float = 0.6
    n_requests: int = 24
    max_batch: int = 8
    max_input_tokens: int = 64
    max_output_tokens: int = 32
    interval: int = 40
    remeasure: bool = True
    repeats: int = 3
    source: str = "embedded"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_requests < 2 or min(self.max_batch, self.max_input_tokens, self.max_output_tokens) < 1:
            raise OptionError("n_requests must be 2 or more; max_batch and the token limits 1 or more")

    def service(self, scheduler: str) -> ServingConfig:
        """Return the same as a simulated service; its arrivals are given, and its KV memory holds all who fit."""
        tokens = self.max_batch * (self.max_input_tokens + self.max_output_tokens)
        return ServingConfig(
            scheduler=scheduler,
            load=self.load,
            n_requests=self.n_requests,
            max_batch=self.max_batch,
            kv_tokens=max(2, tokens),
            max_input_tokens=self.max_input_tokens,
            max_output_tokens=self.max_output_tokens,
            interval=self.interval,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Validation:
    """What came of it.

    Attributes
    ----------
    costs : ServingCosts
        What the simulation went by.
    requests : DataFrame
        One row a request, scheduler and driver (`agreement.DRIVERS`): `service_metrics.request_table`.
    table : DataFrame
        One row a scheduler and metric: ``scheduler, metric``, every driver's, and those of the simulations over real
        (``ratio, refitted_ratio``).
    parts : DataFrame
        One row a scheduler and kind of pass: ``scheduler, passes, count, real_s, modelled_s, ratio``.
    others_cpu_share : float
        How busy others kept the machine while the real loop served.
    """

    costs: ServingCosts
    requests: pd.DataFrame
    table: pd.DataFrame
    parts: pd.DataFrame
    others_cpu_share: float


def validate(config: ValidationConfig, costs: ServingCosts, progress: Progress | None = None) -> Validation:
    """Serve the same requests twice under every scheduler.

    Parameters
    ----------
    config : ValidationConfig
    costs : ServingCosts
        Of the model; task loads are theirs, times too unless they are measured anew.
    progress : callable, optional
        Called with (stage, done, total).

    Raises
    ------
    CostsError
        When the costs are another model's, or were measured under other conditions and are not to be measured anew.
    """
    report = progress or (lambda stage, done, total: None)
    with emoe_core.load(
        resolve_model(config.model),
        budget=config.budget,
        tolerance=1.0,
        dtype=config.dtype,
        device=config.device,
        interval=config.interval,
        seed=config.seed,
    ) as engine:
        costs.require_model(engine.index.source_hash)
        texts = task_tokens(engine, config.source, "test", config.seed)
        _warm(engine, texts)
        if config.remeasure:
            costs = _measured_anew(costs, engine, config, report)
        else:
            conditions.require_conditions(costs, conditions.conditions_here(engine))
        coming = cut_arrivals(config.service(config.schedulers[0]), costs)
        promised = objectives(coming, costs, ServingConfig.ttft_factor, ServingConfig.tpot_factor)
        others, tables, parts = OtherWork(), [], []
        for scheduler in config.schedulers:
            service = config.service(scheduler)

            def done(count: int, name: str = scheduler) -> None:
                report(f"served under {name}", count, config.n_requests)

            passes: list[Pass] = []
            real = serve_real(engine, service, costs, coming, texts, promised, done, passes.append)
            own = replace(costs, **asdict(fitted(passes)))
            for driver, served in (
                ("real", real),
                ("simulated", simulate(service, costs, coming, promised)),
                ("refitted", simulate(service, own, coming, promised, believed=costs)),
            ):
                tables.append(request_table(served).assign(scheduler=scheduler, driver=driver))
            parts.append(parts_of(passes, costs).assign(scheduler=scheduler))
        share = others.share()
    requests = pd.concat(tables, ignore_index=True)
    return Validation(costs, requests, compare(requests), pd.concat(parts, ignore_index=True), share)


def serve_real(
    engine: emoe_core.Engine,
    service: ServingConfig,
    costs: ServingCosts,
    coming: Sequence[Arrival],
    texts: Mapping[str, Sequence[int]],
    promised: Mapping[str, Objective],
    done: Callable[[int], None] = lambda count: None,
    on_pass: Callable[[Pass], None] | None = None,
) -> list[Served]:
    """Serve arrivals by the real loop, in real time; return their records by number.

    Parameters
    ----------
    texts : mapping of str to sequence of int
        Token ids of each task, repeated or cut to a prompt's length.
    done : callable, optional
        Called with the number of answers so far.
    on_pass : callable, optional
        Told of every forward pass.
    """
    started = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - started

    limits = BatchLimits(service.max_batch, service.kv_tokens)
    scheduler = make_scheduler(service.scheduler, costs, service.max_bypassed)
    loop = ServingLoop(engine, scheduler, limits, costs, clock, on_pass=on_pass)
    waiting, answers = list(coming), list[Answer]()
    while waiting or not loop.idle:
        if loop.idle and waiting[0].arrival_s > clock():
            time.sleep(waiting[0].arrival_s - clock())
        while waiting and waiting[0].arrival_s <= clock():
            one = waiting.pop(0)
            loop.submit(
                cut(texts[one.task], one.input_tokens),
                one.task,
                one.output_tokens,
                promised[one.task],
                costs.tasks[one.task].expected_output_tokens,
                arrival_s=one.arrival_s,
            )
        if ended := loop.turn():
            answers += ended
            done(len(answers))
    return [_served(answer, promised[answer.task]) for answer in sorted(answers, key=lambda answer: answer.number)]


def simulate(
    service: ServingConfig,
    costs: ServingCosts,
    coming: Sequence[Arrival],
    promised: Mapping[str, Objective],
    believed: ServingCosts | None = None,
) -> list[Served]:
    """Serve arrivals by the simulation, from residents that have seen every task, as the real engine's have.

    ``believed`` are the costs by which the scheduler decides, where they are not those that hold.
    """
    replica = make_replica(service, costs)
    replica.scheduler = make_scheduler(service.scheduler, believed or costs, service.max_bypassed)
    assert replica.residents is not None
    for task in sorted(costs.tasks):
        replica.residents.admit([Request(task, 1)], [])
    return Cluster([replica]).run([make_request(service, costs, promised, one) for one in coming])


def _measured_anew(
    costs: ServingCosts, engine: emoe_core.Engine, config: ValidationConfig, report: Progress
) -> ServingCosts:
    """Return the costs with times, slots and conditions of an engine."""
    used = conditions.conditions_here(engine)
    here = {name: getattr(used, name) for name in ("tolerance", "dtype", "expert_dtype", "device")}
    return replace(
        costs,
        **asdict(_times(engine, config, report)),
        slots_per_layer=tuple(engine.plan.slots_per_layer),
        kv_token_bytes=engine.memory(1, 1).kv_bytes,
        settings={**costs.settings, **here, "budget": config.budget},
        environment={**costs.environment, "cpu": used.cpu, "threads": used.threads},
    )


def _times(engine: emoe_core.Engine, config: ValidationConfig, report: Progress) -> Times:
    """Measure what will be served: prompts up to the longest, batches up to the largest."""
    longest = config.max_input_tokens
    smaller = [size for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if size < config.max_batch]
    return measure_times(
        engine,
        # Steps are timed over the longer of two: a context is a prompt and what was said since.
        prompt_tokens=(max(1, longest // 2), max(2, longest)),
        batches=[*smaller, config.max_batch],
        repeats=config.repeats,
        source=config.source,
        seed=config.seed,
        progress=report,
    )


def _warm(engine: emoe_core.Engine, texts: Mapping[str, Sequence[int]]) -> None:
    loop = ServingLoop(engine, make_scheduler("fcfs", None), BatchLimits(2, 1024))
    for task, ids in sorted(texts.items()):
        loop.submit(cut(ids, 16), task, 4)
    loop.run()


def _served(answer: Answer, promised: Objective) -> Served:
    return Served(
        answer.number,
        answer.task,
        answer.arrival_s,
        answer.admitted_s,
        answer.first_token_s,
        answer.finished_s,
        answer.prompt_tokens,
        len(answer.token_ids),
        promised.ttft_s,
        promised.tpot_s,
        held_mass=float("nan"),
        batch=0,
    )
