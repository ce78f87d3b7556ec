from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from workbench.machine.environment import compute_threads, describe_environment, git_revision


def test_the_environment_names_versions_machine_and_identity() -> None:
    found = describe_environment(seed=3, dtype="float32", model_hash="m", data_hash="d")
    assert found.python == platform.python_version()
    assert found.executable == sys.executable
    assert found.packages["torch"] == importlib.metadata.version("torch")
    assert found.cpu and found.ram_bytes > 2**20 and 1 <= found.cores <= (os.cpu_count() or 1)
    record = json.loads(json.dumps(found.to_dict()))
    assert (record["seed"], record["dtype"], record["model_hash"], record["data_hash"]) == (3, "float32", "m", "d")
    assert found.tags()["env.seed"] == "3" and found.tags()["env.torch"] == found.packages["torch"]


def test_unknown_identity_is_not_tagged() -> None:
    assert not {"env.seed", "env.model_hash"} & set(describe_environment().tags())


def test_threads_are_torchs_own_where_it_is_loaded() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert compute_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_commit_is_that_of_the_code_wherever_one_works() -> None:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False)
    assert git_revision()[0] == (head.stdout.strip() if head.returncode == 0 else None)
