"""Recorded runs made again: real notebooks in real kernels, a real model, a real store."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from sweep_bench import Bench, wait_for

from emoe_core.errors import ExperimentError
from workbench.compare.verify.checks import check_data, check_model
from workbench.compare.verify.judge import (
    DIFFERS,
    EQUAL,
    MISSING,
    NEW,
    SHOWN,
    WITHIN,
    Tolerances,
    judge_metrics,
    judge_table,
)
from workbench.compare.verify.plan import plan_rerun
from workbench.compare.verify.rerun import VERIFIES_TAG
from workbench.models.reference.tiny import tiny_moe
from workbench.quality.configuration import ExperimentConfig, as_params, config_of
from workbench.tracking import run as tracking
from workbench.tracking.place import HOME_VARIABLE
from workbench.tracking.record import RunRecord
from workbench.tracking.run_lookup import find_run
from workbench.tracking.runs import search
from workbench.tracking.store import open_store
from workbench.workloads import prompt_stream, prompts_hash

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def recorded(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Return a project with three finished runs: one of a tiny model, two of the dummy notebook."""
    root = tmp_path_factory.mktemp("recorded")
    shutil.copytree(empty_store / "mlruns", root / "mlruns")
    tiny_moe(root / "tiny")
    (root / "gate").touch()
    dummy = {"notebook": str(FIXTURES / "dummy.ipynb"), "kind": "quality"}
    stages = [
        {"notebook": str(FIXTURES / "tiny_run.ipynb"), "kind": "quality", "fixed": {"model": str(root / "tiny")}},
        dummy | {"grid": {"outcome": ["ok", "wait"]}, "fixed": {"gate": str(root / "gate")}},
    ]
    (root / "recorded.yaml").write_text(yaml.safe_dump({"name": "recorded", "stages": stages}))
    bench = Bench(root)
    bench.answer = bench.emoe("sweep", str(root / "recorded.yaml"), "--jobs", "3")
    assert bench.answer.returncode == 0, bench.answer.stderr
    return bench


@pytest.fixture
def runs(recorded: Bench, monkeypatch: pytest.MonkeyPatch) -> list[RunRecord]:
    """Return the runs: tiny, ok, wait."""
    monkeypatch.setenv(HOME_VARIABLE, str(recorded.root))
    client = open_store()
    return [RunRecord.of(client, item) for item in recorded.current()]


@pytest.mark.long
def test_a_run_of_a_model_is_reproduced_bit_by_bit(recorded: Bench, runs: list[RunRecord]) -> None:
    answer = recorded.emoe("verify", runs[0].run_id[:12], "--json")
    assert answer.returncode == 0, answer.stderr + answer.stdout
    found = json.loads(answer.stdout)
    status = {item["name"]: item["status"] for item in [*found["metrics"], *found["tables"]]}
    assert {name for name, word in status.items() if word == EQUAL} >= {
        *("hit_rate", "loads", "reroutes", "slot_bytes", "answers.tokens"),
    }
    assert status["run_s"] == status["answers.ttft_s"] == SHOWN
    # Whoever tests changed code is told so.
    assert [item for item in found["differences"] if item["what"] != "code"] == []
    assert found["reproduced"] and found["threads"] == runs[0].environment["threads"]
    assert found["parameters"] == {"model": str(recorded.root / "tiny")}
    assert "content hash" in answer.stderr and "as recorded" in answer.stderr
    again = find_run(open_store(), found["again_run_id"])
    assert again.tags[VERIFIES_TAG] == runs[0].run_id and again.notebook is not None
    assert open_store().get_run(runs[0].run_id).data.tags["emoe.verified"] == f"reproduced by {again.run_id}"
    assert [item.info.run_id for item in recorded.current()] == [run.run_id for run in runs]


def test_another_value_is_told_and_the_exit_code_says_so(recorded: Bench, runs: list[RunRecord]) -> None:
    open_store().log_metric(runs[1].run_id, "slot_bytes", 1.0)
    open_store().log_metric(runs[1].run_id, "gone", 1.0)
    answer = recorded.emoe("verify", runs[1].run_id)
    assert answer.returncode == 1
    assert "not reproduced: slot_bytes differs" in answer.stdout and "not reproduced: gone missing" in answer.stdout
    assert "Traceback" not in answer.stderr


@pytest.mark.long
def test_an_interrupt_leaves_no_kernel_and_a_killed_run(recorded: Bench, runs: list[RunRecord]) -> None:
    (recorded.root / "gate").unlink()
    process = recorded.start("verify", runs[2].run_id)

    def waiting() -> list[Any]:
        assert process.poll() is None
        found = search(open_store(), f"tags.`{VERIFIES_TAG}` = '{runs[2].run_id}'")
        return [item for item in found if "dummy.pid" in item.data.tags]

    [item] = wait_for(waiting)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    wait_for(lambda: not psutil.pid_exists(int(item.data.tags["dummy.pid"])))
    assert open_store().get_run(item.info.run_id).info.status == "KILLED"


def test_a_changed_model_is_refused_with_the_way_back(runs: list[RunRecord], tmp_path: Path) -> None:
    plan = plan_rerun(runs[0])
    assert "as recorded" in check_model(runs[0], plan)
    plan.parameters["model"] = str(tiny_moe(tmp_path / "other", seed=1))
    with pytest.raises(ExperimentError, match=r"(?s)content hash is .*recorded was .*--anyway"):
        check_model(runs[0], plan)
    plan.parameters["model"] = str(tmp_path / "absent")
    with pytest.raises(ExperimentError, match="cannot be opened"):
        check_model(runs[0], plan)


def test_the_plan_says_which_notebook_runs(runs: list[RunRecord], tmp_path: Path) -> None:
    plan = plan_rerun(runs[1])
    assert "as it was executed" in plan.origin and plan.working_folder == FIXTURES and plan.remarks == []
    assert plan.parameters == {"outcome": "ok", "gate": str(runs[0].params["model"]).replace("tiny", "gate")}
    assert "as it is now" in plan_rerun(runs[1], source="current").origin
    changed = json.loads((FIXTURES / "dummy.ipynb").read_text())
    changed["cells"][-1]["source"] = ["print('other')"]
    (tmp_path / "dummy.ipynb").write_text(json.dumps(changed))
    given = plan_rerun(runs[1], notebook=tmp_path / "dummy.ipynb")
    assert given.content["cells"][-1]["source"] == ["print('other')"]
    assert given.remarks[0] == "Its code is not the code that made the run."
    with pytest.raises(ExperimentError, match="unknown source 'old': choose one of recorded, current"):
        plan_rerun(runs[1], source="old")
    with pytest.raises(ExperimentError, match=r"cannot read .*absent.ipynb"):
        plan_rerun(runs[1], notebook=tmp_path / "absent.ipynb")


def test_a_run_by_hand_needs_its_notebook_named(bench: Bench) -> None:
    with tracking.run("by hand", "mine", params={"budget": "60%", "tasks": "qa"}, seed=3) as made:
        pass
    run = find_run(open_store(), made.run_id)
    with pytest.raises(ExperimentError, match=r"kept no notebook .*--notebook notebooks/NAME.ipynb"):
        plan_rerun(run)
    plan = plan_rerun(run, notebook=FIXTURES / "dummy.ipynb")
    assert plan.parameters == {"budget": "60%", "seed": 3}
    assert plan.remarks == ["Not recorded, so the notebook's defaults are used: tolerance, prompts, outcome, gate."]
    with pytest.raises(ZeroDivisionError), tracking.run("by hand", "broken"):
        raise ZeroDivisionError
    with pytest.raises(ExperimentError, match=r"broken .* is failed: only finished runs"):
        plan_rerun(find_run(open_store(), "broken"))


def test_data_is_compared_beforehand_where_the_run_says_all_of_it(bench: Bench) -> None:
    config = ExperimentConfig(source="fixture", n_prompts=3, split="test", tasks=("qa", "code"))
    assert config_of(as_params(config)) == config
    right = prompts_hash(prompt_stream(config.stream()))
    for data_hash, differs in ((right, False), ("0" * 64, True)):
        with tracking.run("data", data_hash[:4], params=as_params(config), data_hash=data_hash) as made:
            pass
        assert (check_data(find_run(open_store(), made.run_id))[1] is not None) == differs


def test_metrics_are_judged_by_their_kind() -> None:
    before = {"kl_nats": 0.01, "loads": 7.0, "tpot_s": 0.1, "fresh_peak_bytes": 100.0, "x": 1.0, "n": math.nan}
    after = before | {"kl_nats": 0.01 + 1e-8, "loads": 8.0, "tpot_s": 0.3, "fresh_peak_bytes": 104.0, "more": 1.0}
    before |= {"lost": 1.0}
    judged = {item.name: item for item in judge_metrics(before, after, Tolerances())}
    assert {name: item.status for name, item in judged.items()} == {
        **{"kl_nats": WITHIN, "loads": DIFFERS, "tpot_s": SHOWN, "fresh_peak_bytes": WITHIN, "x": EQUAL},
        **{"lost": MISSING, "more": NEW, "n": EQUAL},
    }
    assert judged["loads"].relative == pytest.approx(1 / 7)
    strict = {item.name: item.status for item in judge_metrics(before, after, Tolerances(0, 0, 0, 0.5))}
    assert strict["kl_nats"] == strict["fresh_peak_bytes"] == strict["tpot_s"] == DIFFERS
    assert judge_metrics({"a": 1.0}, {"a": math.nan}, Tolerances())[0].status == DIFFERS
    assert judge_metrics({"a": 0.0}, {"a": 1.0}, Tolerances())[0].relative == math.inf


def test_tables_are_judged_cell_by_cell() -> None:
    before = pd.DataFrame({"text": ["a", None], "loss": [1.0, np.nan], "stall_s": [1.0, 2.0], "hits": [1, 2]})
    after = before.assign(text=["a", "b"], stall_s=[9.0, 2.0], loss=[1.0 + 1e-9, np.nan], extra=1).drop(columns="hits")
    judged = {item.name: item for item in judge_table("t", before, after, Tolerances())}
    assert {name: item.status for name, item in judged.items()} == {
        **{"t.text": DIFFERS, "t.loss": WITHIN, "t.stall_s": SHOWN, "t.hits": MISSING, "t.extra": NEW},
    }
    assert (judged["t.text"].unequal, judged["t.text"].cells) == (1, 2)
    assert [item.status for item in judge_table("t", before, before.copy(), Tolerances())] == [EQUAL] * 4
    assert judge_table("t", before, before.head(1), Tolerances())[0].status == DIFFERS
    assert judge_table("t", before, None, Tolerances())[0].status == MISSING
