"""Commands that are printed to be pasted, and those of the Makefile, work in folders of any name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from emoe_core.errors import DataError, PredictorError
from workbench.cli import app
from workbench.models.reference.tiny import tiny_moe
from workbench.quality.profile.profiling import stored_profile
from workbench.replay.predictor_training import stored_predictor
from workbench.serving.costs.measure import stored_costs
from workbench.tracking.place import HOME_VARIABLE, store_uri, ui_command

NAMES = ("two words", "it's", "a;b & $HOME `x` (y) [bold]")
ROOT = Path(__file__).parents[3]
MAKEFILE = ROOT / "Makefile"
# What people read, messages included; the changelog tells of names as they were.
NAMING = ("*.py", "*.md", "*.yaml", "*.ipynb", "*.j2", ":!CHANGELOG.md", ":!tests")


@pytest.mark.parametrize("name", NAMES)
def test_the_command_for_the_interface_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / name))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("sys.executable", str(tmp_path / name / "python"))
    show = tmp_path / name / "mlflow"
    show.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    show.chmod(0o755)
    shown = subprocess.run(["sh", "-c", ui_command()], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["ui", "--backend-store-uri", store_uri()]


def test_the_command_for_a_server_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host/a?b=1&c=2")
    assert shlex.split(ui_command()) == ["open", "http://host/a?b=1&c=2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_names_a_model_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    model = tiny_moe(tmp_path / name)
    for ask, words in (
        (stored_profile, ["model", "profile"]),
        (stored_costs, ["model", "costs"]),
        (stored_predictor, ["predictor", "train"]),
    ):
        with pytest.raises((DataError, PredictorError)) as error:
            ask(model)
        command = str(error.value).split("with `")[1].rsplit("`", 1)[0]
        assert shlex.split(command) == ["emoe", *words, str(model)]


def test_every_command_that_is_named_anywhere_exists_with_its_options() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z", *NAMING], cwd=ROOT, capture_output=True, text=True, check=True)
    unknown = []
    for file in filter(None, tracked.stdout.split("\0")):
        for named in re.findall(r"`(?:\.venv/bin/)?emoe ([a-z][^`]*)`", (ROOT / file).read_text()):
            command: Any = typer.main.get_command(app)
            words = named.replace("\\n", " ").split()
            while words and hasattr(command, "commands"):
                command = command.commands.get(words.pop(0))
            options = {word.split("=")[0] for word in words if word.startswith("--")}
            if command is None or options - {name for part in command.params for name in part.opts} - {"--help"}:
                unknown.append(f"{file}: emoe {named}")
    assert not unknown


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_makefile_works_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    home = tmp_path / name
    (home / ".venv/bin").mkdir(parents=True)
    (home / "notebooks").mkdir()
    for program in ("emoe", "jupytext"):
        stub = home / ".venv/bin" / program
        # The second is called from another folder.
        stub.write_text("#!/bin/sh\nprintf '<%s>' 'called'\n")
        stub.chmod(0o755)
    shutil.copy(MAKEFILE, home)
    for file in ("pyproject.toml", "constraints.txt", ".venv/.ready"):
        (home / file).touch()
    made = subprocess.run(["make", "--silent", "ui", "pair"], cwd=home, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("<called>") == 2
