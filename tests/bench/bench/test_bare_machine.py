"""`make gpu` from its kit, end to end, on a machine without a network, MLflow, papermill and datasets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bare_machine import IN_KIT, bare_environment, kit_of
from made_traces import trace_of
from sweep_bench import Bench

from workbench.bench import device_page
from workbench.replay.recorded_routing import trace_file
from workbench.results.taking import Taken, take_results
from workbench.tracking.results import runs_frame
from workbench.tracking.store import open_store

ROOT = Path(__file__).parents[3]


@pytest.mark.long
def test_the_whole_command_runs_from_the_kit_and_its_records_become_runs(bench: Bench, tmp_path: Path) -> None:
    kit, out, file = kit_of(tmp_path / "kit"), tmp_path / "out", tmp_path / "small.yaml"
    trace_of(600, 6, 8, 2).save(kit / trace_file("reference").name)
    sizes = {"tokens": 8, "prompt_tokens": 6, "warm_tokens": 2, "long_prompt_tokens": 32, "profiled_tokens": 2}
    stage = {"notebook": "notebooks/13_decoding_on_a_device.ipynb", "kind": "timing"}
    fixed = {"shape": "bench", "scale": 0.001, "device": "cuda", **sizes}
    stages = [{**stage, "fixed": fixed, "grid": {"system": ["stock-grouped_mm", "emoe"]}}]
    stages += [{**stage, "label": "host", "fixed": {**fixed, "budget": "40%"}, "grid": {"tolerance": [0.0, 1.0]}}]
    file.write_text(yaml.safe_dump({"name": "small", "stages": stages}))
    command = [
        sys.executable,
        "scripts/gpu.py",
        "--kit",
        str(kit),
        "run",
        "--device",
        "simulated",
        "--sweep",
        str(file),
    ]
    env = bare_environment(tmp_path / "bare", tmp_path / "cache")
    first = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "installing " + ", ".join(IN_KIT.values()) in first.stderr and (out / "site" / "pydantic").is_dir()
    assert "4 runs are recorded, 0 failed, 0 are left" in first.stderr
    page = (out / "gpu.md").read_text()
    assert page.startswith("# REHEARSAL on simulated") and page.count("| emoe | 40% | host |") == 2
    tested = device_page.tests_in(out)[0]
    assert tested.failed == 0 and tested.passed + tested.skipped > 0
    again = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "installing" not in again.stderr and "[1/4]" not in again.stderr
    assert take_results(open_store(), out / "runs") == [Taken("small-rehearsal-simulated", 4, 0)]
    runs = runs_frame("small-rehearsal-simulated")
    assert (runs["tokens_per_s"] > 0).all() and set(runs["status"]) == {"FINISHED"}
