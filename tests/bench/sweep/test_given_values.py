"""Values given on the command line take the place of what a sweep file fixes, under a name of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_bench import Bench

from emoe_core.errors import ExperimentError
from workbench.models.reference.tiny import tiny_moe
from workbench.sweep.file import read_sweep
from workbench.sweep.plan import describe_plan
from workbench.tracking.results import runs_frame

YOUR_MODEL = Path(__file__).parents[3] / "sweeps" / "your_model.yaml"


def test_given_values_count_and_name_the_sweep(bench: Bench) -> None:
    file = bench.write(grid={"tolerance": [0.0]}, fixed={"budget": "40%", "prompts": 2})
    assert bench.emoe("sweep", str(file), "--set", "budget=60%").returncode == 0
    (run,) = runs_frame("dummy-60").to_dict("records")
    assert (run["budget"], run["prompts"]) == ("60%", 2)
    assert [item.finished for item in describe_plan(file, {"budget": "60%"}).runs] == [True]
    assert [item.finished for item in describe_plan(file).runs] == [False]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("budgets=60%", "no stage of sweep 'dummy' fixes budgets"),
        ("budget", "give NAME=VALUE"),
        ("prompts=x", "prompts"),
    ],
)
def test_what_cannot_be_given_is_one_line(bench: Bench, setting: str, message: str) -> None:
    file = bench.write(grid={"tolerance": [0.0]}, fixed={"budget": "40%", "prompts": 2})
    answer = bench.emoe("sweep", str(file), "--set", setting, "--dry-run")
    assert answer.returncode == 2 and message in answer.stderr and "Traceback" not in answer.stderr


def test_a_model_of_one_s_own_takes_every_stage(tmp_path: Path) -> None:
    for model in (str(tiny_moe(tmp_path / "moe", family="olmoe")), "allenai/OLMoE-1B-7B-0924"):
        sweep = read_sweep(YOUR_MODEL, {"model": model}).file
        assert sweep.name == f"your_model-{Path(model).name.replace('-', '_')}"
        assert {stage.fixed["model"] for stage in sweep.stages} == {model}
    with pytest.raises(ExperimentError, match="cannot be set"):
        read_sweep(YOUR_MODEL, {"modle": "x"})


@pytest.mark.long
def test_every_question_is_answered_for_a_model_of_one_s_own(bench: Bench, tmp_path: Path) -> None:
    model = tiny_moe(tmp_path / "own", family="olmoe")
    sizes = (
        "source=fixture",
        "n_prompts=8",
        "warm_prompts=8",
        "max_new_tokens=6",
        "timing_prompts=1",
        "timing_tokens=4",
    )
    settings = [word for setting in (f"model={model}", *sizes) for word in ("--set", setting)]
    answer = bench.emoe("sweep", str(YOUR_MODEL), *settings)
    assert answer.returncode == 0, answer.stderr
    assert set(bench.statuses()) == {"FINISHED"} and len(bench.statuses()) == len(describe_plan(YOUR_MODEL).runs)
