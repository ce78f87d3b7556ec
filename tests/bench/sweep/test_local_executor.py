from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import papermill
import pytest
from test_sweep_file import notebook

from emoe_core.errors import ExperimentError, OptionError
from workbench.sweep.executors.choice import executor_maker
from workbench.sweep.executors.local import LocalExecutor, Machine, visible_gpus
from workbench.sweep.executors.protocol import Ending, Job
from workbench.sweep.executors.run_notebook import execute
from workbench.sweep.schema import Needs
from workbench.tracking.place import HOME_VARIABLE

MACHINE = Machine(cores=4, memory_bytes=10_000_000_000)
CHILD = "import os, json\nopen(where, 'w').write(json.dumps({n: os.environ.get(n) for n in names}))"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    return tmp_path


def needs(**given: Any) -> Needs:
    return Needs.model_validate(given)


@pytest.mark.parametrize(
    ("asked", "fit"),
    [
        ({}, 1),
        ({"memory": "3GB"}, 3),
        ({"memory": "1GB"}, 4),
        ({"memory": "1GB", "cores": 3}, 1),
        ({"memory": "20GB"}, 0),
    ],
)
def test_a_machine_holds_as_many_runs_as_cores_and_memory_allow(asked: dict[str, Any], fit: int) -> None:
    assert MACHINE.capacity(needs(**asked)) == fit


def test_each_run_gets_one_gpu_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus() == ("2", "5")
    two = Machine(8, 64_000_000_000, ("2", "5"))
    assert two.capacity(needs()) == 2
    assert two.capacity(needs(gpus=2)) == 1
    assert two.capacity(needs(gpus=0)) == 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()


def test_runs_see_their_own_gpu_and_their_share_of_cores(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = notebook(project / "n.ipynb", "where = ''\nnames = []", CHILD)
    place = LocalExecutor(project / "running", most=4, machine=Machine(4, 64_000_000_000, ("2", "5")))
    names = ["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "EMOE_RUN_ID"]
    try:
        for run in ("a", "b"):
            assert place.has_room(needs(), "quality")
            place.start(Job(run, path, {"where": str(project / run), "names": names}, needs(), "quality"))
        assert not place.has_room(needs(), "quality"), "both GPUs are taken"
        assert place.has_room(needs(gpus=0), "quality")
        endings: list[Ending] = []
        while len(endings) < 2:
            endings += place.wait()
        assert [item.error for item in endings if not item.ok] == []
        assert place.has_room(needs(), "quality"), "GPUs come back"
    finally:
        place.stop()
    seen = [json.loads((project / run).read_text()) for run in ("a", "b")]
    assert [list(item.values()) for item in seen] == [["2", "2", "a"], ["5", "2", "b"]]


def test_a_run_that_no_machine_here_can_hold_is_refused(project: Path) -> None:
    place = LocalExecutor(project / "running", most=4, machine=MACHINE)
    with pytest.raises(ExperimentError, match="needs 1 GPUs, this machine offers 0"):
        place.has_room(needs(gpus=1), "quality")
    assert place.has_room(needs(memory="20GB"), "quality"), "memory is an estimate: alone it is tried"
    assert place.at_once(needs(memory="1GB"), "timing") == 1


def test_unknown_executors_and_stray_addresses_are_refused() -> None:
    with pytest.raises(OptionError, match="choose one of local, ray"):
        executor_maker("cloud")
    with pytest.raises(OptionError, match="--executor ray"):
        executor_maker("local", "host:1")


def test_a_kernel_that_never_answers_is_started_anew(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = project / "starts"
    wrapper = project / "kernel.py"
    wrapper.write_text(
        f"import os, runpy, time\nstarts = {str(starts)!r}\nheard = os.path.exists(starts)\n"
        "open(starts, 'a').write('x')\n"
        "while not heard:\n    time.sleep(1)\n"
        "runpy.run_module('ipykernel_launcher', run_name='__main__')\n"
    )
    spec = project / "kernels" / "python3"
    spec.mkdir(parents=True)
    command = [sys.executable, str(wrapper), "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "p", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(project))
    first, whole = iter([2]), papermill.execute_notebook

    def impatient_at_first(*given: Any, start_timeout: int, **more: Any) -> Any:
        return whole(*given, start_timeout=next(first, start_timeout), **more)

    monkeypatch.setattr(papermill, "execute_notebook", impatient_at_first)
    path = notebook(project / "n.ipynb", "number = 1", "print(number + 1)")
    job = {"notebook": str(path), "output": str(project / "out.ipynb"), "parameters": {"number": 41}}
    assert execute(job | {"working_folder": str(project)}) == {"ok": True}
    assert "42" in (project / "out.ipynb").read_text()
    assert starts.read_text() == "xx"
