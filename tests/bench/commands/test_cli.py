"""The command line: answers at once, errors without a traceback, exit codes."""

from __future__ import annotations

import runpy
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from sweep_bench import NOTEBOOK, Bench

from emoe_core.errors import EmoeError
from workbench import cli
from workbench.commands.groups import RENAMED

SCRIPTS = Path(__file__).parents[3] / "scripts"


def tree(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words of every command and group, and what they name."""
    yield path, command
    for name, part in getattr(command, "commands", {}).items():
        yield from tree(part, (*path, name))


TREE = dict(tree(typer.main.get_command(cli.app)))


def choices(command: str, parameter: str) -> tuple[str, ...]:
    """Return what may be given for a parameter of a command."""
    (found,) = [part for part in TREE[tuple(command.split())].params if part.name == parameter]
    return get_args(found.type_descriptor.annotation)


def emoe(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["emoe", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_every_command_explains_itself_and_each_of_its_options(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emoe(monkeypatch, *path, "--help") == 0
    assert " ".join(("Usage: emoe", *path)) in capsys.readouterr().out
    command = TREE[path]
    assert command.help and not [part.name for part in command.params if not part.help]


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_an_unknown_option_is_one_line_that_names_the_help(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emoe(monkeypatch, *path, "--no-such-option") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: No such option: --no-such-option")
    assert line.endswith(f"See `{' '.join(('emoe', *path))} --help`.")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_answers_with_the_new_one(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emoe(monkeypatch, *old.split(), "tiny", "--some-option") == 2
    assert capsys.readouterr().err == f"Error: `emoe {old}` is now `{new}`.\n"


def test_choices_on_the_command_line_are_those_of_the_code() -> None:
    from emoe_core.checkpoint.index import EXPERT_DTYPES, parse_dtype
    from emoe_core.planning.control import REPLANS
    from emoe_core.planning.tasks import TASK_TYPES
    from emoe_core.predictor import HALF_LIVES
    from emoe_core.predictor.network import VARIANTS
    from workbench.compare.verify.plan import SOURCES
    from workbench.models.reference import EMBEDDED
    from workbench.serving.orders import SCHEDULERS
    from workbench.serving.simulation.router import ROUTERS
    from workbench.workloads.store import SOURCES as PREPARED

    assert all(parse_dtype(name) for name in choices("run", "dtype"))
    for offered, known in (
        (choices("run", "expert_dtype"), EXPERT_DTYPES),
        (choices("run", "task"), TASK_TYPES),
        (choices("serve", "scheduler"), SCHEDULERS),
        (choices("serve", "router"), ROUTERS),
        (choices("serve", "predictor"), HALF_LIVES),
        (choices("simulate serving", "router"), ROUTERS),
        (choices("simulate serving", "replan"), REPLANS),
        (choices("predictor train", "variant"), VARIANTS),
        (choices("verify", "source"), SOURCES),
        (choices("model build", "model"), EMBEDDED),
        (choices("data prepare", "source"), PREPARED),
        (choices("predictor train", "source"), (*PREPARED, "fixture")),
    ):
        assert sorted(offered) == sorted(known)


@pytest.mark.parametrize(
    ("typed", "offered"), [("emoe mod", "model"), ("emoe model fam", "families"), ("emoe run --dtype bf", "bfloat16")]
)
def test_the_shell_completes_commands_options_and_choices(
    typed: str, offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_EMOE_COMPLETE", "source_bash")
    assert emoe(monkeypatch) == 0
    assert "_EMOE_COMPLETE=complete_bash" in capsys.readouterr().out
    monkeypatch.setenv("_EMOE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert emoe(monkeypatch) == 0
    assert capsys.readouterr().out.split() == [offered]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_every_script_explains_itself(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code and f"usage: {script.name}" in capsys.readouterr().out.replace("Usage", "usage")


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
        (["model", "pack", "/no/such/model"], "/no/such/model"),
        (["sweep", "/no/such.yaml"], "no sweep file at /no/such.yaml"),
        (["cache", "shred"], "No such command 'shred'"),
        (["run", "reference", "Hello", "--max-new-tokens", "0"], "give at least 1"),
        (["run", "reference", " "], "the prompt is empty"),
        (["run", "reference", "Hello", "--task", "poetry"], "'poetry' is not one of 'qa'"),
        (["serve", "tiny", "--gpus", "1"], "--gpus goes with --replicas"),
        (["report"], "holds no sweep"),
        (["compare", "one", "two"], "has no run or sweep 'one'"),
        (["verify", "one"], "has no run or sweep 'one'"),
        (["verify", "one", "--relative", "-1"], "a tolerance is 0 or more"),
        (["ui", "--port", "70000"], "--port 70000: give 1 to 65535"),
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
    assert "no parameter 'bugdet'. Did you mean 'budget'? Known parameters: budget," in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 99])
def test_debug_lets_the_traceback_through_wherever_it_stands(
    bench: Bench, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["sweep", "/no/such.yaml"]
    arguments.insert(place, "--debug")
    monkeypatch.setattr(sys, "argv", ["emoe", *arguments])
    with pytest.raises(EmoeError):
        cli.main()


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (["simulate", "serving"], "tiny has no serving costs yet: measure them with `emoe model costs tiny`"),
        (["serve", "--scheduler", "emoe"], "tiny has no serving costs yet: measure them with `emoe model costs tiny`"),
        (["run", "--max-quality-loss", "0.01"], "tiny has no task profile yet: measure one with `emoe model profile "),
    ],
)
def test_a_model_is_named_as_it_was_given(
    command: list[str],
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    assert emoe(monkeypatch, *command, "tiny", *(["Why?"] if "run" in command else [])) == 2
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run", "refrence", "hi"), "Did you mean 'reference'?"),
        (("run", "/nonexistent/model", "hi"), "/nonexistent/model does not exist. Give the folder"),
        (("serve", "reference", "--port", "99999"), "--port 99999: give 0 to 65535"),
        (("serve", "reference", "--port", "-5"), "--port -5: give 0 to 65535"),
        (("serve", "reference", "--scheduler", "nosuch"), "'nosuch' is not one of 'fcfs'"),
        (("model", "pack", "reference", "--out", "."), "--out . is a folder: name the file to write"),
        (("bench", "reference", "--limit", "abc"), "cannot understand the amount of memory 'abc'"),
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
    assert emoe(monkeypatch, "cache", "list") == 0
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
    assert emoe(monkeypatch, "model", "pack", model, "--verify") == 0
    assert "every checksum verified" in capsys.readouterr().out
    packs = list((tmp_path / "cache").rglob("*.emoe"))
    assert emoe(monkeypatch, "run", model, "Hello", "--budget", "60%", "--max-new-tokens", "3") == 0
    shown = capsys.readouterr().out
    assert "hits" in shown and "loads" in shown and "dense weights" in shown and "first token" in shown
    assert "none replaced" in shown and "lossy" not in shown
    few = ("--budget", "2 slots", "--tolerance", "1", "--max-new-tokens", "8")
    assert emoe(monkeypatch, "run", model, "Hello", *few) == 0
    assert "lossy: " in capsys.readouterr().out, "what was replaced is not called exact"
    assert list((tmp_path / "cache").rglob("*.emoe")) == packs and len(packs) == 1
    packs[0].write_bytes(packs[0].read_bytes()[:-1] + b"\x00")
    assert emoe(monkeypatch, "estimate", model, "--budget", "1B") == 2
    assert "short" in capsys.readouterr().err
