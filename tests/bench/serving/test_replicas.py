"""Promises of `emoe serve --replicas`: a real Ray cluster of two nodes, a replica each, asked by OpenAI's client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as Counted
from prometheus_client.parser import text_string_to_metric_families
from ray_bench import ray_cluster
from server_bench import LONG, PATIENCE_S
from sweep_bench import wait_for
from typer.testing import CliRunner

import emoe_core
from emoe_core.config import EngineConfig
from emoe_core.errors import ExperimentError, OptionError
from workbench.cli import app
from workbench.models.reference.tiny import tiny_moe
from workbench.serving.replicas.residency import Residency, look, missing_for

ray = pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
pytest.importorskip("grpc", reason="Ray Serve is not installed (extra `ray`)")

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80_000_000}
PROMPTS = {"qa": "Why is the sky blue?", "code": "def add(a, b):"}


class ClusterService:
    """`emoe serve --replicas` in a process of its own, and clients of it."""

    def __init__(self, model: Path, address: str) -> None:
        options = ["--replicas", "2", "--ray-address", address, "--port", "0", "--budget", "3 slots", "--name", "tiny"]
        # What runs at the end may take long on a busy machine.
        options += ["--max-batch", "4", "--max-waiting", "2", "--drain-s", str(PATIENCE_S)]
        command = [sys.executable, "-m", "workbench.cli", "serve", str(model), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "Serving" in line:
                break
        else:
            raise AssertionError("".join(said))
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        url = said[-1].split(" at ")[1].strip()
        self.http = httpx.Client(base_url=url.removesuffix("/v1"), timeout=PATIENCE_S)
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S)

    def complete(self, prompt: str, **options: Any) -> Any:
        return self.client.completions.create(model="tiny", prompt=prompt, **({"max_tokens": 8} | options))

    def samples(self, name: str, **labels: str) -> dict[str, Any]:
        """Return the samples of a metric by replica."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        found = [sample for family in families for sample in family.samples if sample.name == name]
        return {one.labels.get("replica", ""): one for one in found if labels.items() <= one.labels.items()}

    def finished(self) -> dict[str, float]:
        return {name: one.value for name, one in self.samples("emoe_requests_total", result="finished").items()}

    def busy(self) -> list[str]:
        return [name for name, one in self.samples("emoe_running_requests").items() if one.value]

    def replica_of(self, task: str, **options: Any) -> str:
        """Return the replica that a request of a task goes to."""
        before = self.finished()
        self.complete(PROMPTS[task], extra_body={"task": task}, **options)
        (chosen,) = wait_for(lambda: [name for name, count in self.finished().items() if count > before[name]])
        return chosen

    def close(self) -> None:
        self.client.close()
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("replicas") / "model", "mixtral", seed=3)


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        # Inherited by the nodes and what runs on them.
        patch.setenv("EMOE_CACHE", str(model.parent))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with ray_cluster(NODE, NODE, 1) as made:
            yield made.address


@pytest.fixture(scope="module")
def services() -> Iterator[list[ClusterService]]:
    started: list[ClusterService] = []
    yield started
    for service in started:
        service.close()


@pytest.fixture
def service(services: list[ClusterService], model: Path, address: str) -> ClusterService:
    """Return the service of the test before, or a new one where that test ended it."""
    if not services or services[-1].process.poll() is not None:
        services.append(ClusterService(model, address))
    return services[-1]


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[emoe_core.Engine]:
    with emoe_core.load(model, pack_dir=model.parent / "packs", budget="3 slots") as loaded:
        yield loaded


def test_every_node_has_a_replica_and_all_are_ready(service: ClusterService) -> None:
    processes = {one.labels["process"] for one in service.samples("emoe_replica").values()}
    assert len(processes) == 2 and all(Path(f"/proc/{process}").exists() for process in processes)
    assert service.http.get("/readyz").json() == {"ready": True, "replicas": 2, "replicas_wanted": 2}
    assert service.http.get("/healthz").status_code == 200
    assert [item.id for item in service.client.models.list()] == ["tiny"]


def test_a_task_goes_to_the_replica_that_holds_its_experts(service: ClusterService) -> None:
    body = {
        "model": "tiny",
        "prompt": PROMPTS["qa"],
        "task": "qa",
        # Long enough that the other request comes while this one runs, also on a busy machine.
        "max_tokens": 48,
        "stream": True,
        "ignore_eos": True,
    }

    def side_by_side() -> None:
        """Ask for both tasks at once: as long as nothing tells replicas apart, they go to different ones."""
        with service.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            service.complete(PROMPTS["code"], max_tokens=1, extra_body={"task": "code"})
            assert list(lines)[-2] == "data: [DONE]"

    # Until each has predicted what its task wants.
    while min(service.finished().values()) <= EngineConfig().interval:
        side_by_side()

    def settled() -> bool:
        """Whether what the replicas hold has come to the router: each task keeps to its own."""
        found = [service.replica_of(task) for task in ("qa", "code", "code", "qa")]
        if found[0] == found[3] != found[1] == found[2]:
            return True
        # A pair that missed each other left both with a mix: the next predictions tell them apart.
        side_by_side()
        return False

    assert wait_for(settled)


def test_answers_are_those_of_offline_generation(service: ClusterService, engine: emoe_core.Engine) -> None:
    messages = [{"role": "user", "content": "Is the sky blue?"}]
    chat = service.client.chat.completions.create(model="tiny", messages=messages, max_tokens=20)
    chunks = list(service.complete("Why?", max_tokens=12, stream=True, stream_options={"include_usage": True}))
    drawn = [service.complete("Why?", max_tokens=12, temperature=1.3, top_p=0.9, seed=5) for _ in range(2)]
    (said,) = engine.generate(["Is the sky blue?"], max_new_tokens=20)
    (continued,) = engine.generate(["Why?"], max_new_tokens=12, chat=False)
    assert chat.choices[0].message.content == said.text
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == continued.text
    assert chunks[-1].usage.completion_tokens == len(continued.token_ids)
    assert drawn[0].choices[0].text == drawn[1].choices[0].text != continued.text


def test_what_cannot_be_served_is_refused_as_by_one_engine(service: ClusterService) -> None:
    with pytest.raises(openai.BadRequestError, match="n is not served"):
        service.complete("x", n=2)
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        service.client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="limit is 511"):
        service.complete("x", max_tokens=2000)


def test_a_client_that_goes_frees_its_place_at_the_replica(service: ClusterService) -> None:
    stream = service.complete("Why?", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    wait_for(lambda: not service.busy())
    counts = [one.value for one in service.samples("emoe_requests_total", result="cancelled").values()]
    assert sorted(counts) == [0, 1]


def test_when_all_replicas_are_full_clients_are_told_to_come_back(service: ClusterService) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 100, "ignore_eos": True}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: service.http.post("/v1/completions", json=body), range(16)))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 429} and statuses[200] >= 12
    assert {answer.json()["error"]["code"] for answer in answers if answer.status_code == 429} == {"queue_full"}


def test_a_replica_that_is_killed_loses_its_running_requests_only(service: ClusterService) -> None:
    where = {name: int(one.labels["process"]) for name, one in service.samples("emoe_replica").items()}
    # Of a task that nobody knows, hence in turn: four fill each replica, and one waits there.
    own = {"task": "comparison", "ignore_eos": True}
    streams = [iter(service.complete("Why?", max_tokens=LONG, stream=True, extra_body=own)) for _ in range(8)]
    for stream in streams:
        next(stream)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(service.complete, "How?", extra_body=own) for _ in range(2)]
        wait_for(lambda: [one.value for one in service.samples("emoe_queue_length").values()] == [1, 1])
        doomed = min(where)
        os.kill(where[doomed], signal.SIGKILL)
        ends = Counter(end_of(stream) for stream in streams)
        answers = [request.result().choices[0].text for request in waiting]
    assert ends == {"length": 4, "replica_lost": 4} and all(answers)
    assert service.samples("emoe_requests_lost_total")[""].value == 4
    assert service.samples("emoe_requests_resent_total")[""].value == 1
    # Serve starts another in its place.
    wait_for(lambda: service.http.get("/readyz").json()["replicas"] == 2)
    assert doomed not in service.samples("emoe_replica")


def end_of(stream: Iterator[Any]) -> str | None:
    """Return how a streamed answer ended: its reason, or the code of its error."""
    try:
        return [chunk.choices[0].finish_reason for chunk in stream][-1]
    except openai.APIError as error:
        assert "the replica that ran this request ended" in str(error)
        return str(error.code)


def test_sigterm_lets_running_requests_finish_and_ends_the_replicas(service: ClusterService) -> None:
    processes = [int(one.labels["process"]) for one in service.samples("emoe_replica").values()]
    chunks = iter(service.complete("Why?", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}))
    next(chunks)
    service.process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert service.process.wait(PATIENCE_S) == 0
    wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


def test_a_cluster_without_room_is_refused() -> None:
    from workbench.serving.replicas.service import Placement, require_room

    nodes = [{"Alive": True, "Resources": {"CPU": 3.0}}, {"Alive": False, "Resources": {"CPU": 9.0}}]
    require_room(nodes, Placement(replicas=3))
    with pytest.raises(OptionError, match=r"3 replicas of 2 CPUs .* have room for 1 \(3 CPUs"):
        require_room(nodes, Placement(replicas=3, cpus=2))
    with pytest.raises(OptionError, match="unknown router"):
        Placement(router="best")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing"], "missing does not exist"),
        (["MODEL", "--budget", "1KB"], "short"),
        (["MODEL", "--device", "cuda"], "--gpus 1"),
        (["MODEL", "--host", "0.0.0.0"], "give a key"),
        (["MODEL", "--ray-address", "127.0.0.1:1"], "ray start --head"),
    ],
)
def test_what_cannot_work_is_refused_before_a_replica_starts(model: Path, options: list[str], message: str) -> None:
    arguments = [str(model) if option == "MODEL" else option for option in options]
    result = CliRunner().invoke(app, ["serve", "--replicas", "2", *arguments])
    assert result.exit_code and message in str(result.exception)


def test_other_code_on_a_node_is_refused(model: Path) -> None:
    from workbench.serving.replicas.replica import EngineReplica, ReplicaConfig
    from workbench.serving.server.limits import ServerLimits

    config = ReplicaConfig(str(model), "tiny", {}, "fcfs", None, ServerLimits(), 100, "another")
    with pytest.raises(ExperimentError, match="another version of this code"):
        EngineReplica(config)


def test_what_a_task_lacks_is_told_by_who_has_served_it_most(engine: emoe_core.Engine) -> None:
    engine.generate([PROMPTS["qa"]], max_new_tokens=8, chat=False, tasks=["qa"])
    report = look(engine, {"qa": 1, "unheard": 1})
    layers, experts = engine.control.shape
    assert report.held.bit_count() == 3 * layers and report.wanted["qa"][1].bit_count() == 3 * layers
    reports = {"fits": report, "empty": Residency(), "wrong": Residency(0, {"qa": (0, 0)})}
    lacking = missing_for("qa", reports)
    held = sum(1 << layer * experts + one for layer in range(layers) for one in engine.loader.table.resident(layer))
    assert lacking("empty") == 3 * layers and lacking("fits") == (report.wanted["qa"][1] & ~held).bit_count()
    assert {missing_for("never asked", reports)(name) for name in reports} == {0}


def test_metrics_of_replicas_stand_side_by_side() -> None:
    from workbench.serving.replicas.front import together
    from workbench.serving.replicas.replica import ReplicaMetrics

    reports = []
    for name in ("a", "b"):
        registry = CollectorRegistry()
        Counted("emoe_things", "Things.", ["kind"], registry=registry).labels("x").inc()
        reports.append(ReplicaMetrics(name, "host", 7, list(registry.collect())))
    where, things = together(reports)
    totals = [one.labels for one in things.samples if one.name == "emoe_things_total"]
    assert totals == [{"replica": "a", "kind": "x"}, {"replica": "b", "kind": "x"}]
    assert [one.labels["node"] for one in where.samples] == ["host", "host"]
