"""The systems that the bench compares: how they are named, which run here, and that they compute the same."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import typer
from forced_bench import spec_of
from rich.console import Console

from emoe_core.errors import LimitError, OptionError
from workbench.commands.bench import _systems, show_systems
from workbench.machine import control_groups
from workbench.machine.control_groups import Controller
from workbench.measure.decode_job import measure
from workbench.models.reference.tiny import tiny_moe
from workbench.systems import llama_cpp
from workbench.systems.systems import DEFAULT_SYSTEMS, SYSTEMS, find_system, find_systems, require_runnable


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("model"), "olmoe")


def test_every_system_is_described_and_every_default_is_known() -> None:
    assert all(system.what for system in SYSTEMS.values())
    assert [system.name for system in find_systems(DEFAULT_SYSTEMS)] == list(DEFAULT_SYSTEMS)


def test_suffixes_change_limit_and_options() -> None:
    system = find_system("emoe[policy=decayed_demand;threads=4]:no-limit")
    assert not system.limited and system.options == {"predictor": None, "policy": "decayed_demand", "threads": 4}
    assert find_system("emoe").limited and find_system("emoe").budgeted
    assert not find_system("emoe-resident").budgeted


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vllm"], "unknown system 'vllm': choose of emoe"),
        (["emoe[policy"], "unknown system"),
        (["emoe[policy]"], "key=value"),
        (["emoe", "emoe"], "named twice"),
        ([" "], "no system was named"),
    ],
)
def test_bad_system_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find_systems(names)


def test_llama_cpp_without_its_package_is_refused_with_the_extra_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    with pytest.raises(OptionError, match=r"the extra 'llama'.*pip install"):
        require_runnable(find_systems(["emoe", "llama.cpp:no-limit"]))
    require_runnable(find_systems(["emoe"]))


def test_every_system_is_listed_with_whether_it_runs_here_and_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_limit() -> Controller:
        raise LimitError("there is no memory controller [of any version]")

    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(control_groups, "find_controller", no_limit)
    with pytest.raises(typer.Exit):
        show_systems(True)
    told = capsys.readouterr().out
    lines = {words[0]: words[-1] for words in map(str.split, told.splitlines()) if words and words[0] in SYSTEMS}
    assert set(lines) == set(SYSTEMS) and all(system.what in told for system in SYSTEMS.values())
    assert "llama.cpp cannot run here: it needs the extra 'llama': CMAKE_ARGS" in told and "-e '.[llama]'" in told
    assert "No memory limit can be set (--limit): there is no memory controller [of any version]" in told

    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(control_groups, "find_controller", lambda: Controller(2, Path("/sys/fs/cgroup")))
    with pytest.raises(typer.Exit):
        show_systems(True)
    told = capsys.readouterr().out
    lines = {words[0]: words[-1] for words in map(str.split, told.splitlines()) if words and words[0] in SYSTEMS}
    assert lines == dict.fromkeys(SYSTEMS, "yes")
    assert "cannot" not in told and "A memory limit can be set (--limit): cgroup v2, memory.max" in told


def test_the_notice_of_what_is_left_out_names_the_extra_as_it_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.systems.llama_cpp.is_installed", lambda: False)
    said = Console(file=io.StringIO(), width=300)
    assert not any(name.startswith("llama.cpp") for name in _systems(None, said))
    assert "'.[llama]'" in said.file.getvalue()


def test_the_resident_engine_loads_no_expert_after_loading(checkpoint: Path) -> None:
    found = measure(spec_of(checkpoint, budget="100%", predictor=None))
    assert found["counters"]["bytes_loaded"] == 0 and found["counters"]["hits"] == found["counters"]["lookups"] > 0


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_emoe_stock_and_accelerate_decode_the_same_likeliest_tokens(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family)
    found = {
        "emoe": measure(spec_of(path, budget="50%", predictor=None)),
        "stock": measure(spec_of(path, "stock", experts_implementation="eager")),
        "grouped": measure(spec_of(path, "stock", experts_implementation="grouped_mm")),
        "accelerate": measure(spec_of(path, "accelerate", cpu_bytes=300_000)),
    }
    assert len({tuple(row["likeliest"]) for row in found.values()}) == 1
    assert all(row["decoded_tokens"] == 4 and len(row["token_s"]) == 4 for row in found.values())
    assert "0 of" not in found["accelerate"]["description"], found["accelerate"]["description"]
    assert list(tmp_path.glob("offload-*")) == []
