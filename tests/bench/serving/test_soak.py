"""A soak: minutes of requests to a real server process, and a judge that tells rounding from wrong answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from soak import Reply, SoakConfig, Soaked, memory_slope, questions, soak
from soak_check import Offline, judge

import emoe_core
from workbench.models.reference.tiny import tiny_moe


@pytest.mark.long
def test_twelve_minutes_of_requests_in_one_lose_nobody_answer_as_offline_and_fill_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    config = SoakConfig(
        str(tiny_moe(tmp_path / "model", "mixtral", seed=3)), "3 slots", simulated_s=720.0, compression=12.0
    )
    with emoe_core.load(config.model, budget=config.budget) as engine:
        asked = questions(engine.model.config.get_text_config().vocab_size, config)
        found = soak(config, asked)
        verdicts = judge(engine, asked, found.replies)
    assert found.sent == found.finished_by_server == 360
    assert found.lost == found.doubled == found.failed == 0
    assert verdicts["wrong"] == 0 and verdicts["equal"] >= 300 and verdicts["equal"] + verdicts["near"] == 360
    slope, half = memory_slope(found.memory)
    assert 60 * (slope - half) < 0.01 * found.memory[-1][1], "memory grows by less than 1% a minute"


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
