"""Recorded results: equal runs give equal files, and a store that took them has the runs that others had."""

from __future__ import annotations

import dataclasses
import string
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from sweep_bench import Bench

from emoe_core.errors import ExperimentError
from workbench.compare.verify.plan import plan_rerun
from workbench.results.export import export_sweep
from workbench.results.taking import RECORDED_ENDING, Taken, take_results
from workbench.sweep.plan import describe_plan
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.results import artifact_frame, runs_frame
from workbench.tracking.results_file import SweepResults, read_results, write_results
from workbench.tracking.run_lookup import find_run, find_runs
from workbench.tracking.runs import INDEX_TAG
from workbench.tracking.store import open_store

WORDS = st.text(string.ascii_letters + "._-/", min_size=1, max_size=8).filter(lambda word: word.strip("./"))
TEXTS = st.text(max_size=20).map(lambda text: text.encode("utf-8", "ignore").decode())
FRAMES = st.builds(
    pd.DataFrame,
    st.fixed_dictionaries(
        {
            "n": st.lists(st.integers(-(2**53), 2**53), min_size=2, max_size=2),
            "value": st.lists(st.floats(width=64), min_size=2, max_size=2),
            "text": st.lists(st.none() | TEXTS, min_size=2, max_size=2),
        }
    ),
)


def values_of(table: pd.DataFrame) -> dict[str, list[Any]]:
    """Return columns of Python values, where nothing is None."""
    return {str(name): [None if pd.isna(value) else value for value in table[name].tolist()] for name in table.columns}


@st.composite
def recorded(draw: Any) -> list[RecordedRun]:
    return [
        RecordedRun(
            run_id=f"{place:032x}",
            name=draw(TEXTS),
            status="FINISHED",
            started_ms=draw(st.integers(0, 2**40)),
            ended_ms=2**41,
            params=draw(st.dictionaries(WORDS, TEXTS, max_size=3)),
            metrics=draw(st.dictionaries(WORDS, st.floats(allow_nan=False), max_size=3)),
            tags=draw(st.dictionaries(WORDS, TEXTS, max_size=3)) | {INDEX_TAG: str(place)},
            texts=draw(st.dictionaries(st.just("environment.json"), TEXTS, max_size=1)),
            tables=draw(st.dictionaries(st.sampled_from(["prompts", "layers"]), FRAMES, max_size=2)),
        )
        for place in range(draw(st.integers(1, 3)))
    ]


@settings(max_examples=25, deadline=None)
@given(runs=recorded(), data=st.data())
def test_runs_come_back_as_they_were_and_equal_ones_give_equal_bytes(
    runs: list[RecordedRun], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    files = write_results(SweepResults("s", "what it asks", runs), one)
    again = read_results("s", one)
    assert (again.sweep, again.description) == ("s", "what it asks")
    for run, back in zip(runs, again.runs, strict=True):
        for item in dataclasses.fields(RecordedRun):
            if item.name != "tables":
                assert getattr(back, item.name) == getattr(run, item.name), item.name
        assert list(back.tables) == sorted(run.tables)
        for name, table in run.tables.items():
            assert values_of(back.tables[name]) == values_of(table)
    shuffled = data.draw(st.permutations(list(again.runs)))
    for first, second in zip(files, write_results(SweepResults("s", "what it asks", shuffled), other), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_a_store_that_took_results_exports_the_same_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bench.write(grid={"budget": ["40%", "60%"]})
    assert bench.emoe("sweep", str(file)).returncode == 0
    _, files = export_sweep(open_store(), "dummy", bench.root / "results")
    monkeypatch.setenv("EMOE_HOME", str(bench.root / "another"))
    client = open_store()
    assert take_results(client, bench.root / "results") == [Taken("dummy" + RECORDED_ENDING, 2, 0)]
    assert take_results(client, bench.root / "results") == [Taken("dummy" + RECORDED_ENDING, 0, 2)]
    assert take_results(client, bench.root / "results", join=True) == [Taken("dummy", 2, 0)]
    _, again = export_sweep(client, "dummy", bench.root / "again")
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_taken_runs_lie_beside_one_s_own_and_can_be_verified(bench: Bench) -> None:
    file = bench.write(grid={"budget": ["40%", "60%"]})
    assert bench.emoe("sweep", str(file)).returncode == 0
    own = runs_frame("dummy")
    assert bench.emoe("results", "export", "dummy", "--folder", str(bench.root / "results")).returncode == 0
    answer = bench.emoe("results", "import", str(bench.root / "results"))
    assert answer.returncode == 0 and "dummy-recorded: 2 runs taken." in answer.stdout
    assert "dummy" in bench.emoe("results", "show", "--folder", str(bench.root / "results")).stdout
    taken = runs_frame("dummy-recorded")
    shared = [name for name in own if name != "run_id"]
    assert_frame_equal(taken[shared], own[shared])
    assert set(taken["run_id"]).isdisjoint(own["run_id"])
    assert [run.finished for run in describe_plan(file).runs] == [True] * 2
    client = open_store()
    run = find_runs(client, "dummy-recorded").runs[0]
    plan = plan_rerun(run)
    assert plan.parameters["budget"] == "40%" and any("kept no notebook" in remark for remark in plan.remarks)
    compared = bench.emoe("compare", "dummy", "dummy-recorded")
    assert compared.returncode == 0, compared.stderr
    for name in find_run(client, own["run_id"][0]).table_names:
        assert_frame_equal(artifact_frame(taken["run_id"][0], name), artifact_frame(own["run_id"][0], name))


def test_what_cannot_be_exported_or_taken_is_one_line_that_says_what_to_do(bench: Bench) -> None:
    client = open_store()
    with pytest.raises(ExperimentError, match=r"no sweep 'none'.*emoe sweep"):
        export_sweep(client, "none", bench.root)
    with pytest.raises(ExperimentError, match="holds no recorded runs"):
        take_results(client, bench.root)
    with pytest.raises(ExperimentError, match="holds no results of a sweep 'none'"):
        read_results("none", bench.root)
