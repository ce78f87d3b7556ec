"""The catalogue of metrics: it has everything that is logged, and says which way each is better."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from serving_bench import make_costs

from workbench.compare.change import paired_change
from workbench.explore.explorer import Explorer
from workbench.measure.longest import with_ratios
from workbench.metrics.catalogue import CATALOGUE, ENDINGS, GROUPS, HIGHER, LOWER, NEITHER, metric_of
from workbench.metrics.show import column_texts, show, words_of
from workbench.models.reference.tiny import tiny_moe
from workbench.paper.longest import as_metrics
from workbench.quality.configuration import ExperimentConfig
from workbench.serving.checks.agreement import COMPARED
from workbench.serving.simulation.comparison import bounds
from workbench.serving.simulation.experiment import ServingConfig, simulate_serving

ROOT = Path(__file__).parents[3]
SOURCES = [*sorted((ROOT / "notebooks" / "source").glob("*.py")), ROOT / "workbench" / "commands" / "bench.py"]
# What notebooks log as a function gave it: each is called for real below, a run's in `test_experiment.py`.
REAL = {"result.metrics", "seen.metrics", "as_metrics(found)", "as_metrics(table, notes)"}
# What an f-string puts into names, where it is not written beside it; any other varying part is a label.
PARTS = {"row['metric']": COMPARED}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral", seed=3)
    return ExperimentConfig(
        str(checkpoint), budget="3 slots", n_prompts=2, warm_prompts=0, max_new_tokens=2, source="fixture"
    )


def unknown(names: Any) -> list[str]:
    return sorted(name for name in names if not metric_of(name).meaning)


def logged_names(source: Path) -> Iterator[str]:
    """Yield the names that a source logs, a label standing for what varies."""
    tree = ast.parse(source.read_text())
    tuples = {
        target.id: [ast.literal_eval(item) for item in node.value.elts]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Name) and all(isinstance(item, ast.Constant) for item in node.value.elts)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "log_metrics":
            yield from names_of(node.args[0], tuples)


def names_of(node: ast.expr, tuples: dict[str, list[str]]) -> Iterator[str]:
    if isinstance(node, ast.BinOp):
        yield from names_of(node.left, tuples)
        yield from names_of(node.right, tuples)
    elif isinstance(node, ast.Dict):
        for key in node.keys:
            yield from spelled(key, tuples)
    elif isinstance(node, ast.DictComp):
        known = dict(tuples)
        for generator in node.generators:
            if isinstance(generator.target, ast.Name):
                if isinstance(generator.iter, ast.Tuple):
                    known[generator.target.id] = [ast.literal_eval(item) for item in generator.iter.elts]
                elif isinstance(generator.iter, ast.Name) and generator.iter.id in tuples:
                    known[generator.target.id] = tuples[generator.iter.id]
        yield from spelled(node.key, known)
    else:
        assert ast.unparse(node) in REAL, f"{ast.unparse(node)}: log names that can be read, or call it in this test"


def spelled(key: ast.expr | None, known: dict[str, list[str]]) -> list[str]:
    if isinstance(key, ast.Constant):
        return [key.value]
    assert isinstance(key, ast.JoinedStr), ast.dump(key) if key else key
    choices: list[list[str]] = []
    for part in key.values:
        if isinstance(part, ast.Constant):
            choices.append([part.value])
            continue
        assert isinstance(part, ast.FormattedValue)
        if isinstance(part.value, ast.IfExp):
            choices.append([ast.literal_eval(part.value.body), ast.literal_eval(part.value.orelse)])
        else:
            text = ast.unparse(part.value)
            choices.append(list(PARTS.get(text) or known.get(text) or ["label"]))
    return ["".join(parts) for parts in itertools.product(*choices)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_what_notebooks_and_benches_log_is_in_the_catalogue(source: Path) -> None:
    assert unknown(logged_names(source)) == []


def test_what_sweep_files_name_is_in_the_catalogue() -> None:
    for path in sorted((ROOT / "sweeps").glob("*.yaml")):
        named = {name for stage in yaml.safe_load(path.read_text())["stages"] for name in stage["metrics"]}
        assert unknown(named) == [], path


def test_every_metric_of_an_explored_point_is_in_the_catalogue(config: ExperimentConfig) -> None:
    with Explorer() as explorer:
        assert unknown(explorer.observe(config).metrics) == []


def test_every_metric_of_a_service_and_of_a_search_under_a_limit_is_in_the_catalogue() -> None:
    costs = make_costs()
    result = simulate_serving(ServingConfig(n_requests=20), costs)
    assert unknown(result.metrics) == []
    assert unknown(f"fcfs_{name}_{kind}" for name in COMPARED for kind in ("real", "simulated", "ratio")) == []
    assert unknown(f"bound_{name}" for name in bounds(result, costs)) == []
    row = {"configuration": "emoe 40%", "limit_bytes": 1, "longest_tokens": 9, "tokens_capped": False}
    row |= {"largest_batch": 2, "batch_capped": False, "decode_tokens_per_s": 3.0}
    found = as_metrics(with_ratios(pd.DataFrame([row, row | {"configuration": "stock"}])))
    assert len(found) == 13 and unknown(found) == []


@pytest.mark.parametrize(
    ("metric", "direction", "group"),
    [
        ("stock_longest_tokens", HIGHER, "other"),
        ("emoe_40_exact_largest_batch", HIGHER, "other"),
        ("similarity_prompts", NEITHER, "other"),
        ("every_prompt_kl_nats", LOWER, "quality"),
        ("perplexity_ratio_high", LOWER, "quality"),
        ("fresh_control_bytes", NEITHER, "memory"),
        ("emoe/tokens_per_s", HIGHER, "time"),
        ("fcfs_latency_mean_s_ratio", NEITHER, "time"),
        ("others_cpu_share", NEITHER, "time"),
        ("my_similar_bytes_accuracy", NEITHER, "other"),
        ("my_memory_s", NEITHER, "time"),
    ],
)
def test_direction_and_group_are_the_rows_and_never_guessed(metric: str, direction: int, group: str) -> None:
    assert (metric_of(metric).better, metric_of(metric).group) == (direction, group)


def test_a_longer_prompt_and_a_larger_batch_get_a_verdict() -> None:
    a = pd.Series(range(8), dtype=float).to_numpy()
    for metric in ("longest_tokens", "stock_largest_batch"):
        assert paired_change(metric, a, a + 3).verdict == "B is higher, better"
    assert paired_change("similarity_prompts", a, a + 3).verdict == "B is higher"


def test_rows_are_complete_and_say_the_unit_that_their_name_ends_with() -> None:
    twice = [name for name, count in Counter(row.name for row in CATALOGUE).items() if count > 1]
    assert twice == []
    for row in CATALOGUE:
        assert row.meaning and row.group in GROUPS and row.better in (LOWER, NEITHER, HIGHER), row
        assert not row.measured or row.group == "memory", row
        ending = next((end for end in ENDINGS if row.name.endswith(end)), None)
        if row.name != "tokens_per_s" and ending is not None:
            assert row.unit == ENDINGS[ending], row
        if row.name.endswith(("_share", "_rate")):
            assert row.unit == "%", row
    assert len(fields(type(CATALOGUE[0]))) == 7


def test_rates_are_not_seconds() -> None:
    assert (metric_of("goodput_per_s").unit, words_of("goodput_per_s"), show("goodput_per_s", 2.5)) == (
        "1/s",
        "goodput",
        "2.5/s",
    )
    assert column_texts("fcfs_goodput_per_s", [0.25, 1.0]) == ("1/s", ["0.250", "1.000"])
    assert (metric_of("emoe/tokens_per_s").unit, words_of("emoe/tokens_per_s")) == ("tokens/s", "emoe")


def test_measured_memory_is_what_the_system_reports() -> None:
    assert metric_of("stock_serving_peak_bytes").measured and metric_of("memory_ratio").measured
    assert not metric_of("slot_bytes").measured and not metric_of("bytes_loaded").measured
