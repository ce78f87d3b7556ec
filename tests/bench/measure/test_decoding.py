"""Forced tokens decoded in a process of their own: when it stops, and what ends it."""

from __future__ import annotations

from pathlib import Path

import pytest
from forced_bench import spec_of

from workbench.machine.control_groups import Controller
from workbench.measure.decode_job import decode_until
from workbench.measure.decoding import measure_decoding
from workbench.measure.launch import FAILED, KILLED
from workbench.models.reference.tiny import tiny_moe

MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("model"), "olmoe")


def test_decoding_stops_when_its_time_is_over() -> None:
    class Slow:
        def decode(self, token: int) -> int:
            return token

    assert decode_until(Slow(), [1, 2, 3], -1.0) == ([1], pytest.approx([0], abs=1))  # type: ignore[arg-type]


def test_a_process_that_the_limit_ends_is_a_result(controller: Controller, checkpoint: Path) -> None:
    run = measure_decoding(spec_of(checkpoint, budget="50%"), limit_bytes=64 * MIB, controller=controller)
    assert (run.outcome, run.found) == (KILLED, {}) and run.limit_bytes == 64 * MIB and run.limit_hits > 0


def test_a_process_that_refuses_says_why(checkpoint: Path) -> None:
    run = measure_decoding(spec_of(checkpoint, budget="1KB"))
    assert run.outcome == FAILED and "bytes short" in run.error and run.limit_bytes is None
