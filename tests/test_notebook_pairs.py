"""Every committed notebook and its pair in notebooks/source hold the same cells, and most run on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

from workbench.models.names import TINY
from workbench.models.reference import REFERENCE
from workbench.tracking.notebook import cells_of, notebook_parameters, read_notebook, source_hash

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# The first two load it for a few prompts; the others draw its stored profile, and simulate by its stored costs.
ON_REFERENCE = ["00_explore", "01_quickstart", "05_output_lengths_and_sensitivity", "11_scheduling"]


def pair_of(notebook: Path) -> Path:
    return notebook.parent / "source" / f"{notebook.stem}.py"


def test_no_notebook_and_no_source_stands_alone() -> None:
    assert [pair_of(notebook) for notebook in NOTEBOOKS] == sorted((FOLDER / "source").iterdir())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_and_its_source_hold_the_same_cells(notebook: Path) -> None:
    source = jupytext.read(pair_of(notebook), fmt="py:percent")
    content = read_notebook(notebook)
    assert cells_of(source) == cells_of(content), "run `make pair`: it writes the source from the notebook"
    # Its size, and the state of a kernel that is gone.
    assert "widgets" not in content["metadata"]


def test_whoever_runs_all_notebooks_waits_for_few_on_a_real_model() -> None:
    parameters = {notebook.stem: notebook_parameters(notebook) for notebook in NOTEBOOKS}
    models = {name: found["model"].literal() for name, found in parameters.items()}
    assert [name for name, model in models.items() if model != TINY] == ON_REFERENCE
    assert {models[name] for name in ON_REFERENCE} == {REFERENCE}
    assert parameters["11_scheduling"]["throughput_requests"].literal() == 0
    sizes = ("n_prompts", "warm_prompts", "max_new_tokens")
    measured = [found for found in parameters.values() if "measure" not in found or found["measure"].literal()]
    assert max(found[size].literal() for found in measured for size in sizes if size in found) <= 8


def test_synchronising_takes_over_an_edited_source_and_keeps_outputs(tmp_path: Path) -> None:
    notebook = tmp_path / NOTEBOOKS[0].name
    pair_of(notebook).parent.mkdir()
    shutil.copy(FOLDER / "jupytext.toml", tmp_path)
    shutil.copy(NOTEBOOKS[0], notebook)
    shutil.copy(pair_of(NOTEBOOKS[0]), pair_of(notebook))
    text = pair_of(notebook).read_text()
    pair_of(notebook).write_text(text.replace('budget: str = "40%"', 'budget: str = "35%"'))
    later = notebook.stat().st_mtime + 10
    os.utime(pair_of(notebook), (later, later))
    before = json.loads(notebook.read_text())
    subprocess.run([sys.executable, "-m", "jupytext", "--sync", notebook.name], cwd=tmp_path, check=True)
    assert notebook_parameters(notebook)["budget"].default == "'35%'"
    assert source_hash(notebook) != source_hash(NOTEBOOKS[0])
    after = json.loads(notebook.read_text())
    # The cell that changed loses what it had shown: of the cell of parameters, nothing.
    assert [cell.get("outputs") for cell in after["cells"]] == [cell.get("outputs") for cell in before["cells"]]
    assert after["metadata"] == before["metadata"]
