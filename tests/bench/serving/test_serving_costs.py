"""Promises of serving costs: measured on the real engine, kept with the model's identity, refused for another."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from serving_bench import make_costs

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import DataError, OptionError
from emoe_core.planning.tasks import TASK_TYPES
from emoe_core.scheduler.costs import CostsError, ServingCosts, TaskLoad
from workbench import cli
from workbench.models.reference.tiny import LAYERS, tiny_moe
from workbench.serving.costs import conditions
from workbench.serving.costs.measure import CostsConfig, costs_path, measure_costs, stored_costs
from workbench.serving.costs.times import fit_line
from workbench.serving.server.listen import EmoeServer
from workbench.serving.simulation.experiment import ServingConfig, simulate_serving

SMALL = {"prompt_tokens": (4, 16), "batches": (1, 2), "repeats": 2, "prompts": 1, "answer_tokens": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("costs") / "model")


@pytest.fixture(scope="module")
def measured(model: Path, cache: Path) -> ServingCosts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOE_CACHE", str(cache))
        return measure_costs(CostsConfig(str(model), "4 slots", source="fixture", **SMALL))  # type: ignore[arg-type]


def test_every_cost_is_measured_on_the_engine(measured: ServingCosts, model: Path) -> None:
    assert measured.model_hash == open_checkpoint(model).source_hash
    assert measured.prefill_s(100) > 0 and measured.prediction_s > 0
    assert measured.loads_s(3) > 0 and measured.loads_s(0) == 0
    assert measured.decode_batches == (1, 2) and min(measured.decode_step_s) > 0
    assert measured.slots_per_layer == (4,) * LAYERS
    assert measured.kv_token_bytes == 2 * LAYERS * 2 * 16 * 4, "keys and values, 2 heads of 16, float32"
    assert set(measured.tasks) == set(TASK_TYPES)
    assert measured.environment["threads"] >= 1 and 0 <= measured.environment["others_cpu_share"] <= 1
    assert measured.settings["budget"] == "4 slots"


def test_they_come_back_from_their_file_as_they_were(measured: ServingCosts, tmp_path: Path) -> None:
    path = measured.save(tmp_path / "costs.json")
    assert ServingCosts.load(path, measured.model_hash) == measured
    assert [entry.name for entry in tmp_path.iterdir()] == ["costs.json"]


def test_another_models_costs_are_refused(measured: ServingCosts, tmp_path: Path) -> None:
    path = replace(measured, model_hash="f" * 64).save(tmp_path / "costs.json")
    with pytest.raises(CostsError, match=r"measured on model ffffffffffff.*emoe model costs MODEL"):
        ServingCosts.load(path, measured.model_hash)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], "cannot be read"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "format 99"),
        (lambda text: text.replace('"swap_s"', '"swop_s"'), "not a complete file"),
        (lambda text: json.dumps(json.loads(text) | {"expert_load_s": -1.0}), "negative"),
        (lambda text: json.dumps(json.loads(text) | {"decode_batches": [2, 1]}), "ascending batch sizes"),
    ],
)
def test_damaged_costs_are_refused(measured: ServingCosts, tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = measured.save(tmp_path / "costs.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(CostsError, match=message):
        ServingCosts.load(path)


def test_a_model_without_costs_is_told_how_to_get_them(
    model: Path, measured: ServingCosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=f"emoe model costs {model}"):
        stored_costs(model)
    measured.save(costs_path(measured.model_hash))
    assert stored_costs(model) == measured


def test_steps_between_measured_sizes_are_on_a_line_and_never_cheaper_than_smaller_ones() -> None:
    assert make_costs(steps={1: 1.0, 4: 4.0, 8: 5.0}).step_table_s(10).tolist() == pytest.approx(
        [0.0, 1.0, 2.0, 3.0, 4.0, 4.25, 4.5, 4.75, 5.0, 5.25, 5.5]
    )
    assert make_costs(steps={2: 3.0}).step_table_s(4).tolist() == [0.0, 3.0, 3.0, 4.5, 6.0]
    assert make_costs(steps={1: 2.0, 2: 1.5}).step_table_s(2).tolist() == [0.0, 2.0, 2.0]


def test_a_line_of_costs_has_no_negative_part() -> None:
    assert fit_line([1, 2, 3], [3, 5, 7]) == pytest.approx((2.0, 1.0))
    slope, intercept = fit_line([1, 2], [1, 5])
    assert intercept == 0.0 and slope == pytest.approx(11 / 5)
    assert fit_line([1, 2], [3, 1]) == (0.0, 2.0)
    with pytest.raises(CostsError, match="two different sizes"):
        fit_line([2, 2], [1, 1])


@pytest.mark.parametrize(
    "options", [{"prompt_tokens": (8,)}, {"batches": (2, 1)}, {"repeats": 0}, {"batches": ()}, {"prompts": 0}]
)
def test_settings_that_measure_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        CostsConfig(**options)  # type: ignore[arg-type]


def test_shares_and_lengths_of_a_task_must_make_sense() -> None:
    row = ((0.5, 0.5),)
    for bad in (((), (1,), 2.0, row), ((1,), (0,), 2.0, row), ((1,), (1,), 0.5, row), ((1,), (1,), 2.0, ((0.5, 0.1),))):
        with pytest.raises(CostsError):
            TaskLoad(*bad)  # type: ignore[arg-type]


def test_everything_resident_never_swaps(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(cache))
    found = measure_costs(CostsConfig(str(model), "100%", source="fixture", **SMALL))  # type: ignore[arg-type]
    assert found.expert_load_s == found.swap_s == 0.0
    assert np.array(found.slots_per_layer).tolist() == [8] * LAYERS


def test_requests_that_cannot_share_a_batch_are_measured_and_simulated_one_at_a_time(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(cache))
    path = tiny_moe(tmp_path / "model", "gpt_oss")
    found = measure_costs(CostsConfig(str(path), "4 slots", source="fixture", **SMALL))  # type: ignore[arg-type]
    assert found.decode_batches == (1,)
    config = ServingConfig(load=None, rate_per_s=1e6, max_batch=4, n_requests=20)
    table = simulate_serving(config, found).requests.sort_values("first_token_s")
    assert (table["first_token_s"].iloc[1:].to_numpy() > table["finished_s"].iloc[:-1].to_numpy()).all()


def test_conditions_other_than_the_measured_ones_are_told(
    model: Path, measured: ServingCosts, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(cache))
    with emoe_core.load(model, budget="4 slots", tolerance=1.0) as engine:
        same = conditions.conditions_here(engine)
    assert conditions.warning(measured, same) is None
    changes = {
        "slots_per_layer": ((2,) * LAYERS, f"expert slots {4 * LAYERS} in {LAYERS} layers, here {2 * LAYERS} in"),
        "tolerance": (0.0, "tolerance 1, here 0"),
        "dtype": ("float16", "dtype float32, here float16"),
        "expert_dtype": ("int8", "expert dtype auto, here int8"),
        "device": ("tpu", f"device {same.device}, here tpu"),
        "cpu": ("another", "here another"),
        "threads": (64, f"threads {same.threads}, here 64"),
    }
    assert set(changes) == {item.name for item in fields(conditions.Conditions)}
    for name, (value, words) in changes.items():
        (told,) = conditions.differences(measured, replace(same, **{name: value}))
        assert words in told
    assert conditions.differences(measured, conditions.Conditions()) == []


def test_a_server_says_that_its_costs_are_of_another_budget(
    model: Path,
    measured: ServingCosts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    # What follows the start of a server is others' to test; this one ends when it would listen.
    monkeypatch.setattr(EmoeServer, "run_until_stopped", lambda self: self.worker.stop())
    measured.save(costs_path(measured.model_hash))
    for arguments, told in (
        (("--budget", "2 slots", "--scheduler", "emoe"), True),
        (("--budget", "4 slots", "--tolerance", "1", "--scheduler", "emoe"), False),
        (("--budget", "2 slots", "--scheduler", "fcfs"), False),
    ):
        monkeypatch.setattr(sys, "argv", ["emoe", "serve", str(model), "--port", "0", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert ("costs were measured under other conditions" in capsys.readouterr().err) == told, arguments


def test_the_commands_measure_and_simulate(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(cache))

    def emoe(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["emoe", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    options = ["--prompt-tokens", "4", "--prompt-tokens", "16", "--batch", "1", "--batch", "2"]
    options += ["--repeats", "2", "--prompts", "1"]
    assert emoe("model", "costs", str(model), "--budget", "50%", "--source", "fixture", *options) == 0
    assert "loading an expert" in capsys.readouterr().out
    assert emoe("simulate", "serving", str(model), "--requests", "20", "--load", "0.5", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in rows] == ["fcfs", "edf", "emoe", "emoe_oracle"]
    assert all(row["requests"] == 20 for row in rows)
    assert emoe("simulate", "serving", str(model), "--requests", "20", "--load", "0.5", "--scheduler", "fcfs") == 0
    assert "FCFS" in capsys.readouterr().out
    for columns in ("80", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        assert (
            emoe("simulate", "serving", str(model), "--requests", "20", "--load", "0.5", "--scheduler", "emoe_oracle")
            == 0
        )
        told = capsys.readouterr().out
        assert "…" not in told and told.startswith("\n"), told  # nothing is cut, and progress bars stand apart
        names = next(line.split() for line in told.splitlines() if "latency" in line)
        assert names[:5] == ["TTFT", "TTFT", "TPOT", "latency", "latency"] and "P90, P99:" in told
    assert emoe("simulate", "serving", str(model), "--scheduler", "lottery") == 2
    assert "unknown variant 'lottery'" in capsys.readouterr().err
    assert emoe("simulate", "serving", str(model), "--arrivals", "mooncake") == 2
    assert "mooncake_trace.jsonl" in capsys.readouterr().err
    assert emoe("model", "costs", str(model), "--prompt-tokens", "4") == 2
    assert "two or more lengths" in capsys.readouterr().err
