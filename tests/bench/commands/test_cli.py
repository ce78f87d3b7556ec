"""The command line: answers at once, errors without a traceback, exit codes."""

from __future__ import annotations

import socket
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from sweep_bench import NOTEBOOK, Bench

from emoe_core.errors import EmoeError
from workbench import cli


def emoe(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["emoe", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "command",
    [[], ["model"], ["data"], ["run"], ["pack"], ["estimate"], ["sweep"], ["report"], ["compare"], ["verify"]],
)
def test_every_command_explains_itself(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emoe(monkeypatch, *command, "--help") == 0
    assert "Usage: emoe" in capsys.readouterr().out


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoe(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == version("emoe-workbench")


def test_help_loads_none_of_the_heavy_libraries(bench: Bench) -> None:
    import subprocess

    code = "import sys, workbench.cli; print({'torch', 'transformers', 'mlflow', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "/no/such/model", "Hello"], "/no/such/model"),
        (["estimate", "/no/such/model"], "/no/such/model"),
        (["pack", "/no/such/model"], "/no/such/model"),
        (["sweep", "/no/such.yaml"], "no sweep file at /no/such.yaml"),
        (["cache", "shred"], "give 'list' or 'clear'"),
        (["run", "reference", "Hello", "--max-new-tokens", "0"], "give at least 1"),
        (["run", "reference", " "], "the prompt is empty"),
        (["run", "reference", "Hello", "--task", "poetry"], "the task types are qa"),
        (["report"], "holds no sweep"),
        (["compare", "one", "two"], "has no run or sweep 'one'"),
        (["verify", "one"], "has no run or sweep 'one'"),
        (["verify", "one", "--relative", "-1"], "a tolerance is 0 or more"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    bench: Bench,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert emoe(monkeypatch, *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.lstrip().startswith("Error: ")
    assert "Traceback" not in shown


def test_an_unknown_notebook_parameter_reaches_the_user(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench.write(grid={"bugdet": ["20%"]})
    assert emoe(monkeypatch, "sweep", str(path)) == 2
    assert "no parameter 'bugdet'. Known parameters: budget," in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 99])
def test_debug_lets_the_traceback_through_wherever_it_stands(
    bench: Bench, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["sweep", "/no/such.yaml"]
    arguments.insert(place, "--debug")
    monkeypatch.setattr(sys, "argv", ["emoe", *arguments])
    with pytest.raises(EmoeError):
        cli.main()


def test_an_unknown_option_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emoe(monkeypatch, "sweep", "--no-such-option") == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run", "refrence", "hi"), "Did you mean 'reference'?"),
        (("run", "/nonexistent/model", "hi"), "/nonexistent/model does not exist. Give the folder"),
        (("serve", "reference", "--port", "99999"), "--port 99999: give 0 to 65535"),
        (("serve", "reference", "--port", "-5"), "--port -5: give 0 to 65535"),
        (("serve", "reference", "--scheduler", "nosuch"), "unknown scheduler 'nosuch': choose one of fcfs"),
        (("pack", "reference", "--out", "."), "--out . is a folder: name the file to write"),
        (("bench", "reference", "--limit", "abc"), "cannot understand the limit 'abc': give bytes"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    arguments: tuple[str, ...], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("workbench.models.reference.build", lambda **_: pytest.fail("a model was built"))
    assert emoe(monkeypatch, *arguments) == 2
    assert complaint in capsys.readouterr().err


def test_a_port_in_use_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert emoe(monkeypatch, "serve", "/nonexistent", "--port", str(taken.getsockname()[1])) == 2
    assert "give another --port, 0 takes a free one" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    tiny = "--like olmoe-1b-7b --layers 1 --experts 4 --top-k 1 --hidden 64 --intermediate 32 --vocab 512"
    out = tmp_path / "file" / "model"
    assert emoe(monkeypatch, "model", "synth", *tiny.split(), "--out", str(out)) == 2
    said = capsys.readouterr().err
    assert "Name another file or folder" in said and str(tmp_path / "file") in said and "Traceback" not in said


def test_a_dry_run_shows_the_points_and_runs_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench.write(grid={"tolerance": [0.0, 1.0]}, seconds_per_run=45)
    assert emoe(monkeypatch, "sweep", str(path), "--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"{NOTEBOOK.stem} tolerance=1" in shown
    assert "2 of 2 runs to do, about 1 min 30 s" in shown
    assert bench.all_runs() == []


def test_the_cache_is_listed_and_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "packs").mkdir(parents=True)
    (tmp_path / "cache" / "packs" / "one.emoe").write_bytes(bytes(2000))
    assert emoe(monkeypatch, "cache") == 0
    assert "packs" in (shown := capsys.readouterr().out) and "2 kB" in shown
    assert emoe(monkeypatch, "cache", "clear", "--yes") == 0
    assert "Removed 2 kB" in capsys.readouterr().out
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_tiny_model_is_estimated_packed_verified_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from workbench.models.reference.tiny import tiny_moe

    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    model = str(tiny_moe(tmp_path / "model"))
    assert emoe(monkeypatch, "estimate", model, "--budget", "50%") == 0
    assert "smallest exact budget" in (shown := capsys.readouterr().out) and "KV cache" in shown
    assert emoe(monkeypatch, "pack", model, "--verify") == 0
    assert "every checksum verified" in capsys.readouterr().out
    packs = list((tmp_path / "cache").rglob("*.emoe"))
    assert emoe(monkeypatch, "run", model, "Hello", "--budget", "60%", "--max-new-tokens", "3") == 0
    shown = capsys.readouterr().out
    assert "hits" in shown and "loads" in shown and "dense weights" in shown and "first token" in shown
    assert list((tmp_path / "cache").rglob("*.emoe")) == packs and len(packs) == 1
    packs[0].write_bytes(packs[0].read_bytes()[:-1] + b"\x00")
    assert emoe(monkeypatch, "estimate", model, "--budget", "1B") == 2
    assert "short" in capsys.readouterr().err
