"""A sweep's view in MLflow's interface: what it selects, orders and draws, and that it is there after a sweep."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from typing import Any

from mlflow.entities import Metric, Run, RunData, RunInfo, RunTag
from site_pages import add_run
from sweep_bench import Bench

from workbench.tracking.runs import current_runs, find_parent
from workbench.tracking.store import open_store
from workbench.tracking.view import MOST_LETTERS, VIEW_TAG, arrange_view, encoded_view


def read_view(text: str) -> dict[str, Any]:
    """Return a view as the interface unpacks it."""
    head, _, body = text.partition(";")
    assert head == "deflate"
    return dict(json.loads(zlib.decompress(base64.b64decode(body))))


def fill(bench: Bench, metrics: dict[str, float]) -> None:
    """Add two runs that differ in their budget."""
    tags = {"emoe.axes": "budget", "emoe.metrics": "memory_ratio,tpot_ratio", "emoe.superseded": "false"}
    for budget in ("40%", "60%"):
        add_run(bench, "s", budget, metrics=metrics, tags=tags, budget=budget)
    add_run(bench, "s", "old", metrics=metrics, tags=tags | {"emoe.superseded": "true"}, budget="60%")


def test_a_view_shows_savings_beside_their_cost(bench: Bench) -> None:
    fill(bench, {"memory_ratio": 0.5, "perplexity_ratio": 1.1, "tpot_ratio": 1.2, "loads": 3})
    client = open_store()
    parent = find_parent(client, "s")
    arrange_view(client, parent)
    view = read_view(client.get_experiment(parent.info.experiment_id).tags[VIEW_TAG])
    names = ("memory_ratio", "perplexity_ratio", "tpot_ratio")
    assert view["selectedColumns"] == ["params.`budget`", *(f"metrics.`{name}`" for name in names)]
    drawn = [(chart["type"], chart["metricSectionId"]) for chart in view["compareRunCharts"]]
    assert drawn == [
        *[("SCATTER", "saved and paid")] * 3,
        ("PARALLEL", "all settings of a notebook"),
        *(("BAR", group) for group in ("memory", "quality", "time", "other")),
    ]
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} == {
        section["uuid"] for section in view["compareRunSections"]
    }


def test_the_filter_of_a_view_finds_the_current_runs_only(bench: Bench) -> None:
    fill(bench, {"memory_ratio": 0.5})
    client = open_store()
    parent = find_parent(client, "s")
    view = read_view(encoded_view(current_runs(client, parent), parent.info.run_id))
    found = client.search_runs([parent.info.experiment_id], view["searchFilter"], order_by=[view["orderByKey"]])
    assert [item.info.run_name for item in found] == ["40%", "60%"]


def test_a_view_of_many_metrics_fits_a_tag() -> None:
    names = [f"{hashlib.sha256(bytes([number])).hexdigest()}_{unit}" for number in range(200) for unit in ("nats", "s")]
    data = RunData([Metric(name, 1.0, 0, 0) for name in names], [], [RunTag("emoe.metrics", ",".join(names[:20]))])
    info = RunInfo("id", "1", "user", "FINISHED", 0, 1, "active")
    text = encoded_view([Run(info, data)], "parent")
    assert len(text) <= MOST_LETTERS and read_view(text)["selectedColumns"]
