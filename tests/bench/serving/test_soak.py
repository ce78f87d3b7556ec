"""Promises of `emoe soak`: a real server process, and a judge that tells rounding from wrong answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from workbench.cli import app
from workbench.models.reference.tiny import tiny_moe
from workbench.serving.checks.soak import Reply, Soaked, memory_slope
from workbench.serving.checks.soak_check import Offline


@pytest.mark.long
def test_a_short_soak_loses_nobody_and_answers_as_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    model = tiny_moe(tmp_path / "model", "mixtral", seed=3)
    options = ["--hours", "0.02", "--minutes", "0.05", "--rate", "0.5", "--distinct", "8", "--budget", "3 slots"]
    result = CliRunner().invoke(app, ["soak", str(model), *options, "--max-output-tokens", "8", "--json"])
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert result.exit_code == 0 and found["sent"] == found["finished_by_server"] == 36
    assert found["lost"] == found["doubled"] == found["failed"] == found["wrong"] == 0
    assert found["equal"] + found["near"] == 36 and found["equal"] >= 30 and found["memory_bytes"] > 10**7


def test_growth_is_told_from_noise() -> None:
    generator = np.random.default_rng(0)
    for grown in (0.0, 1e4):
        memory = [(float(t), int(1e8 + grown * t + generator.normal(0, 1e5))) for t in range(600)]
        # What fills in the beginning is no leak.
        memory[:120] = [(moment, held // 2) for moment, held in memory[:120]]
        slope, half = memory_slope(memory)
        assert abs(slope - grown) < 2 * half and (slope - half > 0) == (grown > 0)


def test_an_answer_may_leave_the_offline_one_at_a_close_call_only() -> None:
    offline = Offline(("a", "ab", "abc", "abcd", "abcde", "abcdef"), (False, False, False, False, False, True))
    assert [offline.judge(text) for text in ("abcdef", "abcdex", "axcdef", "")] == ["equal", "near", "wrong", "wrong"]


def test_lost_and_doubled_requests_are_counted() -> None:
    replies = (Reply(0, 200, "a", "x"), Reply(1, 200, "a", "x"), Reply(2, 500, "", None))
    found = Soaked(4, replies, 2, ())
    assert (found.lost, found.doubled, found.failed) == (1, 1, 1)
