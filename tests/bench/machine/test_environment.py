"""What a run ran on: read from this process, this machine and the checkout of the code, and nothing made up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from workbench.machine import environment
from workbench.machine.environment import available_cores, compute_threads, describe_environment, git_revision


def test_the_record_names_what_computes_and_what_was_run_and_survives_json() -> None:
    given = {"seed": 3, "dtype": "float32", "model_hash": "m", "data_hash": "d", "reference_hash": "r"}
    record = json.loads(json.dumps(describe_environment(**given).to_dict()))
    assert {name: record[name] for name in given} == given
    assert record["packages"]["torch"] == torch.__version__
    assert record["packages"]["transformers"] == transformers.__version__


def test_runs_are_tagged_with_what_they_have_and_no_more() -> None:
    assert describe_environment(seed=3).tags()["env.seed"] == "3"
    assert not {"env.seed", "env.model_hash"} & set(describe_environment().tags())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to cores")
def test_only_cores_that_this_process_may_run_on_count() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_threads_are_torchs_own_where_it_is_loaded() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert compute_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_codes_own_checkout_and_says_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "environment.py"
    file.write_text("the code\n")
    monkeypatch.setattr(environment, "__file__", str(file))

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        return subprocess.check_output(["git", *identity, *arguments], cwd=tmp_path, text=True).strip()

    git("init", "--quiet")
    assert git_revision() == (None, None), "code that lies in somebody else's checkout has no commit"
    git("add", file.name)
    git("commit", "--quiet", "-m", "the code")
    assert git_revision() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "notes.txt").write_text("not tracked")
    assert git_revision()[1] is False
    file.write_text("changed\n")
    assert git_revision() == (git("rev-parse", "HEAD"), True)
