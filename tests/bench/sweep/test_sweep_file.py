from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep_bench import NOTEBOOK

from emoe_core.errors import ExperimentError
from workbench.sweep.file import SweepSource, read_sweep
from workbench.sweep.points import Point, chosen, plan_stages
from workbench.tracking.notebook import find_notebook, source_hash
from workbench.tracking.place import HOME_VARIABLE

PROJECT = Path(__file__).parents[3]
SWEEPS = sorted((PROJECT / "sweeps").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    return tmp_path


def write(folder: Path, content: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def expand(sweep: SweepSource, beside: Path | None = None) -> list[Point]:
    return [point for plan in plan_stages(sweep, beside) for point in plan.points]


def points(folder: Path, **stage: Any) -> list[Point]:
    content = {"name": "s", "notebook": str(NOTEBOOK), "kind": "quality"} | stage
    return expand(read_sweep(write(folder, content)))


def notebook(path: Path, *cells: str, tags: list[str] | None = None) -> Path:
    wanted = ["parameters"] if tags is None else tags
    listed = [
        {"cell_type": "code", "metadata": {"tags": wanted if index == 0 else []}, "source": text, "outputs": []}
        for index, text in enumerate(cells)
    ]
    path.write_text(json.dumps({"cells": listed, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_points_are_the_grid_in_the_order_of_the_file(project: Path) -> None:
    found = points(project, fixed={"prompts": 3}, grid={"budget": ["20%", "60%"], "tolerance": [0.0, 1.0]})
    assert [point.label for point in found] == [
        "dummy budget=20% tolerance=0",
        "dummy budget=20% tolerance=1",
        "dummy budget=60% tolerance=0",
        "dummy budget=60% tolerance=1",
    ]
    assert found[0].parameters == {"prompts": 3, "budget": "20%", "tolerance": 0.0}


def test_excluded_points_are_left_out_and_only_those(project: Path) -> None:
    grid = {"budget": ["20%", "60%"], "tolerance": [0.0, 1.0]}
    found = points(project, grid=grid, exclude=[{"budget": "20%", "tolerance": 0.0}, {"budget": "60%"}])
    assert [point.axes for point in found] == [{"budget": "20%", "tolerance": 1.0}]
    with pytest.raises(ExperimentError, match="excludes every point"):
        points(project, grid={"tolerance": [0.0]}, exclude=[{"tolerance": 0.0}])


def test_a_stage_without_a_grid_is_one_run(project: Path) -> None:
    assert [point.label for point in points(project)] == ["dummy"]


def test_a_stages_label_tells_runs_of_one_notebook_apart_and_does_not_redo_them(project: Path) -> None:
    plain, labelled = points(project)[0], points(project, label="lossy")[0]
    assert labelled.label == "dummy lossy"
    assert labelled.digest == plain.digest


def test_several_stages_follow_one_another(project: Path) -> None:
    stage = {"notebook": str(NOTEBOOK), "kind": "timing"}
    content = {"name": "s", "stages": [stage | {"grid": {"seed": [1]}}, stage | {"grid": {"seed": [0]}}]}
    assert [point.parameters["seed"] for point in expand(read_sweep(write(project, content)))] == [1, 0]


def test_a_stage_is_chosen_by_its_label_and_brings_the_controls_that_its_times_need(project: Path) -> None:
    stage = {"notebook": str(NOTEBOOK)}
    stages = [
        stage | {"kind": "quality", "label": "first"},
        stage | {"kind": "timing", "label": "control", "control": True, "metrics": ["tpot_s"], "fixed": {"seed": 9}},
        stage | {"kind": "timing", "label": "last", "fixed": {"seed": 1}},
    ]
    plans = plan_stages(read_sweep(write(project, {"name": "s", "stages": stages})))
    assert chosen(plans, None) == plans
    assert [plan.stage.label for plan in chosen(plans, "first")] == ["first"]
    assert [plan.stage.label for plan in chosen(plans, "last")] == ["control", "last", "control again"]
    with pytest.raises(ExperimentError, match=r"'middle': its labels are first, control, last, control again"):
        chosen(plans, "middle")


def test_the_same_run_twice_is_refused(project: Path) -> None:
    stage = {"notebook": str(NOTEBOOK), "kind": "timing", "grid": {"seed": [1]}}
    with pytest.raises(ExperimentError, match="same run twice"):
        expand(read_sweep(write(project, {"name": "s", "stages": [stage, stage]})))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"grids": {}}, "grids: unknown key"),
        ({"kind": "speed"}, "'timing' or 'quality'"),
        ({"grid": {"seed": []}}, "'seed' has no values"),
        ({"grid": {"seed": [1, 1]}}, "names a value twice"),
        ({"grid": {"seed": 1}}, "grid.seed"),
        ({"grid": {"seed": [1]}, "fixed": {"seed": 2}}, "both fixed and on the grid: seed"),
        ({"exclude": [{"seed": 1}]}, "does not set: seed"),
        ({"control": True, "metrics": ["tpot_s"]}, "a control is of kind timing"),
        ({"name": "a b"}, "name"),
        ({"notebook": None}, "notebook"),
    ],
)
def test_a_sweep_file_says_what_is_wrong_with_it(project: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ExperimentError, match="not a usable sweep file") as error:
        points(project, **change)
    assert complaint in str(error.value)


def test_mistakes_are_told_with_their_line(project: Path) -> None:
    text = f"""name: s
stages:
  - notebook: {NOTEBOOK}
    kind: quality
    grid:
      budget: ["20%"]
      tolerance: []
  - notebook: {NOTEBOOK}
    kind: speed
    fixed: {{seed: 1}}
    typo: 3
"""
    with pytest.raises(ExperimentError) as error:
        read_sweep(write(project, text))
    told = [line.strip().split(": ")[0].rsplit("/", 1)[-1] for line in str(error.value).splitlines()[1:]]
    assert told == ["sweep.yaml:5", "sweep.yaml:9", "sweep.yaml:11"]


def test_a_name_or_value_that_the_notebook_does_not_take_is_told_with_its_line(project: Path) -> None:
    text = f"name: s\nnotebook: {NOTEBOOK}\nkind: quality\nfixed:\n  prompts: 4\n  bugdet: '20%'\n"
    with pytest.raises(ExperimentError, match=r"sweep\.yaml:6: dummy\.ipynb has no parameter 'bugdet'"):
        expand(read_sweep(write(project, text)))
    with pytest.raises(ExperimentError, match=r"sweep\.yaml:2: no notebook 'absent\.ipynb'"):
        expand(read_sweep(write(project, text.replace(str(NOTEBOOK), "absent.ipynb"))))


def test_misspelt_keys_are_told_as_they_were_written(project: Path) -> None:
    text = f"name: a b\nnotebook: {NOTEBOOK}\nkind: quality\ngrd: {{seed: [1]}}\ngrid: {{seed: 1}}\n"
    with pytest.raises(ExperimentError) as error:
        read_sweep(write(project, text))
    said = str(error.value)
    assert "grd: unknown key. Did you mean 'grid'?" in said and "stages.0" not in said
    assert "grid.seed: give a list of values" in said and "name: use letters, digits" in said


def test_a_key_that_stands_twice_is_refused(project: Path) -> None:
    with pytest.raises(ExperimentError, match=r"sweep\.yaml:3: the key 'name' stands twice"):
        read_sweep(write(project, "name: a\nkind: quality\nname: b\n"))


def test_what_a_run_needs_follows_its_parameters(project: Path) -> None:
    stage = {"needs": {"memory": "2GB", "cores": 2}, "needs_where": [{"where": {"seed": 1}, "memory": "8GB"}]}
    small, large = points(project, grid={"seed": [0, 1]}, **stage)
    assert (small.needs.memory, small.needs.cores, small.needs.gpus) == (2_000_000_000, 2, None)
    assert (large.needs.memory, large.needs.cores) == (8_000_000_000, 2)
    assert small.digest == points(project, grid={"seed": [0, 1]})[0].digest, "needs are not part of what a run is"
    with pytest.raises(ExperimentError, match="needs_where names parameters that the stage does not set: budget"):
        points(project, needs_where=[{"where": {"budget": "1%"}, "cores": 1}])


def test_broken_or_missing_files_are_named(project: Path) -> None:
    with pytest.raises(ExperimentError, match="is not YAML"):
        read_sweep(write(project, "a: [1"))
    with pytest.raises(ExperimentError, match="not a usable sweep file: it holds no keys"):
        read_sweep(write(project, "just words"))
    with pytest.raises(ExperimentError, match=r"it is empty\. Give at least name, notebook and kind"):
        read_sweep(write(project, "# nothing\n"))
    with pytest.raises(ExperimentError, match="no sweep file at"):
        read_sweep(project / "absent.yaml")
    with pytest.raises(ExperimentError, match=r"no notebook 'absent\.ipynb'"):
        points(project, notebook="absent.ipynb")


def test_a_notebook_is_found_where_the_user_stands_wherever_the_store_is(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "mine.ipynb").write_bytes(NOTEBOOK.read_bytes())
    monkeypatch.chdir(here)
    (point,) = points(project, notebook="mine.ipynb", grid={"seed": [0]})
    assert point.notebook == (here / "mine.ipynb").resolve()


def test_a_search_is_refused_with_what_to_write(project: Path) -> None:
    text = f"name: s\nnotebook: {NOTEBOOK}\nkind: quality\nsearch: {{method: random}}\n"
    with pytest.raises(ExperimentError, match="search: unknown key, searches are gone: write a grid"):
        read_sweep(write(project, text))


def test_an_unknown_parameter_is_refused_with_the_known_ones(project: Path) -> None:
    with pytest.raises(ExperimentError, match="no parameter 'bugdet'") as error:
        points(project, grid={"bugdet": ["20%"]})
    assert "Known parameters: budget, gate, outcome, prompts, seed, tolerance." in str(error.value)


@pytest.mark.parametrize(
    "given", [{"prompts": "4"}, {"prompts": 4.5}, {"budget": 40}, {"tolerance": True}, {"seed": None}, {"gate": 3}]
)
def test_a_value_of_another_type_is_refused(project: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError, match=f"parameter {next(iter(given))!r} is"):
        points(project, fixed=given)


@pytest.mark.parametrize("given", [{"tolerance": 1}, {"gate": None}, {"gate": "x"}, {"prompts": 0}])
def test_values_of_the_annotated_type_are_taken(project: Path, given: dict[str, Any]) -> None:
    assert points(project, fixed=given)[0].parameters == given


def test_parameters_without_annotation_follow_their_default(project: Path) -> None:
    path = notebook(project / "n.ipynb", "count = 3\nanything = None\nmade = make()\n")
    assert points(project, notebook=str(path), fixed={"count": 4, "anything": "x", "made": 2.5})
    with pytest.raises(ExperimentError, match="takes int"):
        points(project, notebook=str(path), fixed={"count": "4"})


def test_notebooks_that_cannot_be_parametrised_are_refused(project: Path) -> None:
    with pytest.raises(ExperimentError, match="no cell tagged 'parameters'"):
        points(project, notebook=str(notebook(project / "n.ipynb", "a = 1", tags=[])))
    with pytest.raises(ExperimentError, match="is not Python"):
        points(project, notebook=str(notebook(project / "n.ipynb", "a = = 1")))
    (project / "n.ipynb").write_text("{}")
    with pytest.raises(ExperimentError, match="not a readable notebook"):
        points(project, notebook="n.ipynb")


def test_notebooks_are_found_from_the_root_then_beside_the_file(project: Path) -> None:
    beside = project / "sweeps"
    beside.mkdir()
    inner = notebook(beside / "n.ipynb", "a = 1")
    assert find_notebook("n.ipynb", beside) == inner.resolve()
    outer = notebook(project / "n.ipynb", "a = 1")
    assert find_notebook("n.ipynb", beside) == outer.resolve()


def test_the_identity_of_a_run_is_source_parameters_and_model(project: Path) -> None:
    model = project / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    path = notebook(project / "n.ipynb", f"a = 1\nmodel = {str(model)!r}", "print(a)")

    def digest(**fixed: Any) -> str:
        return points(project, notebook=str(path), fixed=fixed)[0].digest

    before = digest(a=1)
    assert digest(a=1) == before != digest(a=2)
    content = json.loads(path.read_text())
    content["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
    path.write_text(json.dumps(content))
    assert digest(a=1) == before
    (model / "model.safetensors").write_text("weights")
    with_weights = digest(a=1)
    assert with_weights != before
    (model / "model.safetensors").write_text("other weights")
    assert digest(a=1) != with_weights
    old_source = source_hash(path)
    notebook(path, "a = 1", "print(a + 1)")
    assert source_hash(path) != old_source and digest(a=1) != before


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_projects_own_sweeps_fit_their_notebooks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(PROJECT))
    sweep = read_sweep(file)
    assert sweep.file.name in (file.stem, f"{file.parent.name}-{file.stem.partition('-')[0]}"), "it says where it lies"
    assert expand(sweep, file.parent)
    assert all(stage.seconds_per_run for stage in sweep.file.stages), "each states what it takes"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_committed_sweep_names_its_model_itself(path: Path) -> None:
    for stage in yaml.safe_load(path.read_text())["stages"]:
        said = stage.get("fixed", {}) | stage.get("grid", {})
        assert "model" in said or "shape" in said, "the notebook's default is not for figures"
