"""Promises of the serving simulation: schedules worked out by hand, queueing theory, and nobody lost or doubled."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_bench import FOREVER, make_costs, make_request, two_tasks

from emoe_core.errors import OptionError
from emoe_core.planning.planner import RunningRequest, expected_tokens, make_plan
from emoe_core.scheduler import BatchLimits, Objective, RequestTooLargeError
from emoe_core.scheduler.costs import ServingCosts
from workbench.serving.orders import SCHEDULERS, make_scheduler
from workbench.serving.simulation.arrivals import Arrival
from workbench.serving.simulation.cluster import Cluster
from workbench.serving.simulation.experiment import ServingConfig, capacity_per_s, objectives, simulate_serving
from workbench.serving.simulation.residents import Residents
from workbench.serving.simulation.router import ROUTERS, Router
from workbench.serving.simulation.service_metrics import request_table, service_metrics
from workbench.serving.simulation.simulated_engine import Served, SimulatedEngine

WIDE = BatchLimits(4, 10**6)


def residents(costs: ServingCosts, interval: int = 40, replan: str = "admission") -> Residents:
    return Residents(
        {task: load.shares for task, load in costs.tasks.items()},
        costs.slots_per_layer,
        {task: load.expected_output_tokens for task, load in costs.tasks.items()},
        interval,
        replan,
    )


def serve(
    requests: list[tuple[float, int, int]],
    *,
    costs: ServingCosts | None = None,
    limits: BatchLimits = WIDE,
    scheduler: str = "fcfs",
) -> list[Served]:
    """Serve (arrival, input tokens, output tokens), everything resident."""
    known = costs or make_costs()
    engine = SimulatedEngine(known, make_scheduler(scheduler, known), limits, None)
    coming = [(make_request(n, at, inputs=i, limit=max(o, 1)), o) for n, (at, i, o) in enumerate(requests)]
    return Cluster([engine]).run(coming)


class TestByHand:
    def test_one_request_alone(self) -> None:
        (one,) = serve([(2.0, 3, 4)])
        assert (one.admitted_s, one.first_token_s, one.finished_s, one.output_tokens) == (2.0, 5.0, 8.0, 4)

    def test_a_prompt_holds_up_those_who_run_and_joins_their_steps(self) -> None:
        # 0: prompt 0-2, steps end at 3, 4, then waits for the prompt of 1 (4-7), ends with the step 7-8 of both.
        first, second = serve([(0.0, 2, 4), (3.5, 3, 3)])
        assert (first.first_token_s, first.finished_s) == (2.0, 8.0)
        assert (second.admitted_s, second.first_token_s, second.finished_s) == (4.0, 7.0, 9.0)

    def test_a_full_batch_makes_others_wait_for_the_first_to_end(self) -> None:
        served = serve([(0.0, 1, 3), (0.0, 1, 9), (0.0, 1, 2)], limits=BatchLimits(2, 1000))
        # Prompts 0-1 and 1-2, steps at 3 and 4 end the first; the third's prompt is 4-5, its step ends at 6.
        assert [one.finished_s for one in served] == [4.0, 11.0, 6.0]
        assert served[2].admitted_s == 4.0

    def test_kv_memory_is_reserved_for_the_whole_run(self) -> None:
        served = serve([(0.0, 5, 3), (0.0, 5, 3)], limits=BatchLimits(4, 15))
        assert [one.admitted_s for one in served] == [0.0, 7.0]

    def test_an_answer_of_one_token_ends_with_its_prompt(self) -> None:
        served = serve([(0.0, 2, 1), (0.0, 2, 2)])
        assert [one.finished_s for one in served] == [2.0, 5.0]

    def test_a_larger_batch_takes_longer_steps(self) -> None:
        served = serve([(0.0, 1, 3), (0.0, 1, 3)], costs=make_costs(steps={1: 1.0, 2: 1.5}))
        assert [one.finished_s for one in served] == [5.0, 5.0]

    def test_swaps_and_predictions_hold_up_the_prompt(self) -> None:
        costs = make_costs(expert_load_s=0.5, swap_s=0.25, prediction_s=0.125)
        engine = SimulatedEngine(costs, make_scheduler("fcfs", costs), WIDE, residents(costs, interval=2))
        requests = [
            (make_request(number, number * 10.0, task=task), 1) for number, task in enumerate(("qa", "qa", "code"))
        ]
        served = Cluster([engine]).run(requests)
        # Two experts and a prediction; nothing to load, none due; two experts and a prediction.
        assert [one.first_token_s for one in served] == [2.375, 11.0, 22.375]
        assert engine.residents is not None
        assert (engine.residents.loads, engine.residents.swaps, engine.residents.predictions) == (4, 2, 2)

    def test_metrics_are_the_definitions(self) -> None:
        costs = make_costs()
        engine = SimulatedEngine(costs, make_scheduler("fcfs", costs), BatchLimits(1, 100), None)
        promise = Objective(2.5, 1.0)
        requests = [(make_request(n, float(n), inputs=2, objective=promise), 3 - n) for n in range(3)]
        table = request_table(Cluster([engine]).run(requests))
        # One at a time: first tokens at 2, 6, 9; ends at 4, 7, 9.
        assert table["ttft_s"].tolist() == [2.0, 5.0, 7.0]
        assert table["latency_s"].tolist() == [4.0, 6.0, 7.0]
        assert table["tpot_s"].tolist()[:2] == [1.0, 1.0] and math.isnan(table["tpot_s"][2])
        metrics = service_metrics(table)
        assert metrics["attainment_share"] == pytest.approx(1 / 3)
        assert metrics["goodput_per_s"] == pytest.approx(1 / 9)
        assert metrics["latency_mean_s"] == pytest.approx(17 / 3) and metrics["ttft_p50_s"] == 5.0


class TestQueueingTheory:
    """Batches of one and answers of one token make a single server, whose mean wait is known."""

    COUNT = 20_000

    def wait(self, service_s: np.ndarray, load: float, seed: int) -> float:
        gaps = np.random.default_rng(seed).exponential(float(service_s.mean()) / load, size=self.COUNT)
        # Nanoseconds as tokens, so that service times of any length are whole numbers of them.
        costs = make_costs(prefill_token_s=1e-9)
        engine = SimulatedEngine(costs, make_scheduler("fcfs", costs), BatchLimits(1, 10**15), None)
        coming = [
            (make_request(number, float(at), inputs=max(1, round(service * 1e9))), 1)
            for number, (at, service) in enumerate(zip(np.cumsum(gaps), service_s, strict=True))
        ]
        return float(request_table(Cluster([engine]).run(coming))["wait_s"].mean())

    @pytest.mark.parametrize("load", [0.3, 0.6])
    def test_equal_prompts_wait_as_in_m_d_1(self, load: float) -> None:
        found = self.wait(np.ones(self.COUNT), load, seed=1)
        assert found == pytest.approx(load / (2 * (1 - load)), rel=0.06)

    @pytest.mark.parametrize("load", [0.3, 0.6])
    def test_exponential_prompts_wait_as_in_m_m_1(self, load: float) -> None:
        found = self.wait(np.random.default_rng(2).exponential(size=self.COUNT), load, seed=3)
        assert found == pytest.approx(load / (1 - load), rel=0.08)


COMING = st.lists(
    st.tuples(st.floats(0.0, 6.0), st.sampled_from(["qa", "code"]), st.integers(1, 12), st.integers(1, 9)),
    min_size=1,
    max_size=30,
)


@given(
    drawn=COMING,
    scheduler=st.sampled_from(SCHEDULERS),
    router=st.sampled_from(ROUTERS),
    replicas=st.integers(1, 3),
    replan=st.sampled_from(["admission", "interval"]),
)
@settings(max_examples=80)
def test_every_request_is_served_once_and_whole(
    drawn: list[tuple[float, str, int, int]], scheduler: str, router: str, replicas: int, replan: str
) -> None:
    costs = make_costs(steps={1: 1.0, 4: 1.7}, expert_load_s=0.3, prediction_s=0.1)
    engines = [
        SimulatedEngine(
            costs, make_scheduler(scheduler, costs, 5), BatchLimits(3, 50), residents(costs, 3, replan), place
        )
        for place in range(replicas)
    ]
    now, coming = 0.0, []
    for number, (gap, task, inputs, output) in enumerate(drawn):
        now += gap
        promise = Objective(3.0 * inputs, 1.5)
        coming.append((make_request(number, now, task=task, inputs=inputs, limit=9, objective=promise), output))
    truth = {request.number: (request.arrival_s, output) for request, output in coming}
    served = Cluster(engines, router).run(coming)
    assert [one.number for one in served] == list(range(len(drawn)))
    for one in served:
        arrival_s, output = truth[one.number]
        assert one.arrival_s == arrival_s and one.output_tokens == output
        assert arrival_s <= one.admitted_s < one.first_token_s <= one.finished_s
        assert (one.first_token_s == one.finished_s) == (output == 1)
        assert 1 <= one.batch <= 3
    assert all(engine.idle for engine in engines)


@given(drawn=COMING)
@settings(max_examples=60)
def test_first_come_first_served_keeps_the_order_and_never_idles_while_somebody_waits(
    drawn: list[tuple[float, str, int, int]],
) -> None:
    now, requests = 0.0, []
    for gap, _, inputs, output in drawn:
        now += gap
        requests.append((now, inputs, output))
    served = serve(requests, limits=BatchLimits(2, 1000))
    assert all(a.first_token_s < b.first_token_s for a, b in pairwise(served))
    # Work: all prompts, and the steps that somebody took.
    busy = sorted((one.admitted_s, one.finished_s) for one in served)
    end = 0.0
    for (start, finish), one in zip(busy, sorted(served, key=lambda one: one.admitted_s), strict=True):
        if start > end:
            assert start == one.arrival_s, "the engine stood still while a request waited"
        end = max(end, finish)


@given(drawn=COMING, scheduler=st.sampled_from(SCHEDULERS))
@settings(max_examples=40)
def test_taking_steps_together_changes_nothing(drawn: list[tuple[float, str, int, int]], scheduler: str) -> None:
    """A cluster is advanced at every arrival, an engine with one request after the other only at its own."""
    costs = make_costs(steps={1: 1.0, 2: 1.25})
    results = []
    for interrupted in (False, True):
        engine = SimulatedEngine(costs, make_scheduler(scheduler, costs), BatchLimits(2, 1000), None)
        now = 0.0
        for number, (gap, task, inputs, output) in enumerate(drawn):
            moments = np.linspace(now, now + gap, 7)[1:] if interrupted else [now + gap]
            now += gap
            for moment in moments:
                engine.advance(float(min(moment, now)))
            engine.advance(now)
            engine.submit(make_request(number, now, task=task, inputs=inputs, limit=9), output)
        engine.advance()
        results.append(
            sorted((one.number, round(one.first_token_s, 6), round(one.finished_s, 6)) for one in engine.served)
        )
    assert results[0] == results[1]


class TestResidents:
    @given(
        data=st.lists(
            st.tuples(st.sampled_from(["qa", "code"]), st.integers(1, 50), st.booleans()), min_size=1, max_size=20
        ),
        seed=st.integers(0, 1000),
        slots=st.integers(1, 5),
    )
    @settings(max_examples=60)
    def test_they_are_what_the_engines_planner_asks_for(
        self, data: list[tuple[str, int, bool]], seed: int, slots: int
    ) -> None:
        generator = np.random.default_rng(seed)
        shares = {task: generator.dirichlet(np.ones(5), size=3) for task in ("qa", "code")}
        expected = {"qa": 8.0, "code": 20.0}
        simulated = Residents(shares, [slots] * 3, expected)
        running: list[RunningRequest] = []
        for task, tokens, ends in data:
            new = RunningRequest(task, tokens)
            simulated.admit([new], running)
            running.append(new)
            demand = expected_tokens(running, shares, lambda task, layer: True, expected.__getitem__)
            plan = make_plan(demand, [slots] * 3)
            held = [set(np.flatnonzero(row).tolist()) for row in simulated.held]
            assert held == [set(experts) for experts in plan.experts]
            running = running[1:] if ends else running

    def test_a_plan_for_the_interval_is_kept_until_the_next_prediction(self) -> None:
        simulated = residents(make_costs(), interval=3, replan="interval")
        loads = [simulated.admit([RunningRequest("qa", 4)], [])[0]]
        loads += [simulated.admit([RunningRequest("code", 40)], [])[0] for _ in range(3)]
        assert loads == [2, 0, 0, 2] and simulated.predictions == 2

    def test_loading_is_foretold_exactly(self) -> None:
        simulated = residents(make_costs())
        running = [RunningRequest("qa", 3)]
        simulated.admit(running, [])
        foretold = simulated.loads_for("code", 30, running)
        assert foretold == simulated.admit([RunningRequest("code", 30)], running)[0] == 2

    def test_what_fits_a_task_is_told(self) -> None:
        simulated = residents(make_costs())
        simulated.admit([RunningRequest("code", 3)], [])
        assert simulated.mass("code") == pytest.approx(1.0) and simulated.mass("qa") == 0.0
        assert simulated.missing_for("code") == 0 and simulated.missing_for("qa") == 2


class TestRouters:
    def engines(self, count: int, costs: ServingCosts) -> list[SimulatedEngine]:
        return [
            SimulatedEngine(costs, make_scheduler("fcfs", costs), BatchLimits(4, 1000), residents(costs), place)
            for place in range(count)
        ]

    def replicas_of(self, router: str, tasks: list[str], gap_s: float = 0.0, slack: float = 0.0) -> list[int]:
        costs = make_costs(expert_load_s=0.5)
        requests = [(make_request(n, n * gap_s, task=task), 2) for n, task in enumerate(tasks)]
        return [one.replica for one in Cluster(self.engines(2, costs), router, slack).run(requests)]

    def test_round_robin_goes_in_turn(self) -> None:
        assert self.replicas_of("round_robin", ["qa"] * 5) == [0, 1, 0, 1, 0]

    def test_least_loaded_avoids_the_busy(self) -> None:
        assert self.replicas_of("least_loaded", ["qa"] * 2, gap_s=0.5) == [0, 1]
        assert self.replicas_of("least_loaded", ["qa"] * 2, gap_s=50.0) == [0, 0]

    def test_affinity_sends_tasks_to_where_their_experts_are(self) -> None:
        tasks = ["qa", "code", "code", "qa", "qa", "code"]
        # The second finds both empty of its experts, and the first replica no busier.
        found = self.replicas_of("affinity", tasks, gap_s=1.0, slack=0.5)
        assert found[1] != found[0]
        assert [found[n] for n in (2, 3, 4, 5)] == [found[1], found[0], found[0], found[1]]

    def test_without_slack_affinity_only_decides_between_the_least_loaded(self) -> None:
        assert self.replicas_of("affinity", ["qa"] * 4) == [0, 1, 0, 1]
        costs = make_costs(expert_load_s=0.5)
        coming = [(0.0, "qa"), (0.0, "code"), (50.0, "code"), (99.0, "qa")]
        requests = [(make_request(n, at, task=task), 2) for n, (at, task) in enumerate(coming)]
        served = Cluster(self.engines(2, costs), "affinity").run(requests)
        assert [one.replica for one in served] == [0, 1, 1, 0]

    def test_affinity_does_not_pile_a_task_up_at_one_replica(self) -> None:
        found = self.replicas_of("affinity", ["qa"] * 12, slack=0.5)
        assert abs(found.count(0) - found.count(1)) <= 3

    @pytest.mark.parametrize("kind", ROUTERS)
    def test_a_full_replica_is_passed_over_while_another_has_room(self, kind: str) -> None:
        router: Router[str] = Router(kind, slack=9.0, batch=4, most=2)
        router.seat("ab")
        chosen = []
        for _ in range(4):
            chosen.append(router.choose({"a": 0, "b": 5}.__getitem__))
            router.count(chosen[-1], 1)
        assert chosen.count("a") == chosen.count("b") == 2
        assert router.choose({"a": 0, "b": 5}.__getitem__) in "ab"

    @pytest.mark.parametrize("kind", ROUTERS)
    def test_a_replica_that_goes_is_forgotten_and_the_others_keep_their_requests(self, kind: str) -> None:
        router: Router[str] = Router(kind)
        router.seat("ab")
        router.count("a", 1)
        router.seat("ac")
        router.count("b", -1)
        assert [router.choose(lambda replica: 0) for _ in range(3)].count("b") == 0
        if kind != "round_robin":
            assert router.choose(lambda replica: 0) == "c"


class TestConfiguration:
    def test_the_same_seed_gives_the_same_service(self) -> None:
        config = ServingConfig(n_requests=40, seed=3)
        first, second = (simulate_serving(config, make_costs(expert_load_s=0.2)) for _ in range(2))
        assert first.requests.equals(second.requests) and first.metrics == second.metrics
        other = simulate_serving(ServingConfig(n_requests=40, seed=4), make_costs(expert_load_s=0.2))
        assert other.metrics["latency_mean_s"] != first.metrics["latency_mean_s"]

    def test_an_oracle_tells_the_schedulers_the_truth(self) -> None:
        # Of equal prompts, the shortest answer goes first only if it is known to be short.
        costs = make_costs()
        coming = [
            Arrival(0, "qa", 0.0, 2, 1),
            *(Arrival(n, "qa", 0.1, 2, 9 - n) for n in (1, 2, 3)),
            Arrival(4, "qa", 99.0, 2, 1),
        ]
        order = {}
        for lengths in ("profile", "oracle"):
            config = ServingConfig(scheduler="shortest", lengths=lengths, max_batch=1, load=None, rate_per_s=1.0)
            table = simulate_serving(config, costs, coming).requests
            order[lengths] = table.sort_values("first_token_s")["number"].tolist()
        assert order == {"profile": [0, 1, 2, 3, 4], "oracle": [0, 3, 2, 1, 4]}

    def test_a_load_is_a_share_of_what_a_full_batch_can_do(self) -> None:
        costs = make_costs(steps={1: 1.0, 8: 2.0})
        coming = [Arrival(n, "qa", float(n), 2, 5) for n in range(3)]
        assert capacity_per_s(coming, costs, 8) == pytest.approx(1 / (2 + 4 * 2 / 8))
        result = simulate_serving(ServingConfig(n_requests=60, load=0.5, replicas=2), costs)
        assert result.metrics["rate_per_s"] == pytest.approx(0.5 * result.metrics["capacity_per_s"])

    def test_objectives_are_multiples_of_what_a_task_takes_alone(self) -> None:
        coming = [
            Arrival(n, task, 0.0, inputs, 5) for n, (task, inputs) in enumerate([("qa", 2), ("qa", 4), ("code", 9)])
        ]
        promised = objectives(coming, make_costs(prefill_fixed_s=1.0), 5.0, 2.0)
        assert promised == {"qa": Objective(20.0, 2.0), "code": Objective(50.0, 2.0)}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scheduler": "lottery"}, "unknown scheduler 'lottery'"),
            ({"router": "dice"}, "unknown router"),
            ({"lengths": "guess"}, "unknown lengths"),
            ({"load": None}, "need a load or a rate_per_s"),
            ({"rate_per_s": 2.0}, "not both"),
            ({"n_requests": 1}, "2 or more"),
        ],
    )
    def test_impossible_settings_are_refused(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            ServingConfig(**options)  # type: ignore[arg-type]

    def test_slots_beyond_the_experts_are_refused(self) -> None:
        with pytest.raises(OptionError, match="slots must be 1 to 4"):
            simulate_serving(ServingConfig(n_requests=4, slots=5), make_costs())

    def test_a_prompt_beyond_the_kv_memory_is_refused_by_name(self) -> None:
        with pytest.raises(RequestTooLargeError, match="KV cache"):
            simulate_serving(ServingConfig(n_requests=4, kv_tokens=64, max_output_tokens=64), make_costs())


def test_fewer_slots_mean_more_loading_and_less_mass() -> None:
    costs = make_costs(expert_load_s=0.2, tasks=two_tasks())
    found = {slots: simulate_serving(ServingConfig(n_requests=80, slots=slots), costs).metrics for slots in (1, 2, 4)}
    assert found[1]["held_mass"] < found[2]["held_mass"] < found[4]["held_mass"] == pytest.approx(1.0)
    assert found[4]["expert_loads"] == 4, "with a slot for each, every expert is loaded once"
    assert found[2]["expert_loads"] > found[4]["expert_loads"]


def test_nothing_promised_is_always_kept() -> None:
    assert request_table(serve([(0.0, 5, 5), (0.0, 5, 5)]))["met"].all()
    assert FOREVER.ttft_s == 1e9
