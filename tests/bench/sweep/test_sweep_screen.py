from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from test_sweep_file import points

from workbench.sweep.points import Point
from workbench.sweep.screen import SweepScreen
from workbench.tracking.place import HOME_VARIABLE


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    return points(tmp_path, grid={"seed": [0, 1, 2]}, metrics=["peak_bytes"])


def drawn(screen: SweepScreen) -> str:
    with screen.console.capture() as shown:
        screen.console.print(screen.table())
    return shown.get()


def test_the_table_shows_what_runs_and_counts_the_rest(three: list[Point]) -> None:
    screen = SweepScreen(Console(force_terminal=True, color_system=None, width=120, height=30))
    with screen.console.capture() as said:
        screen.announce(3, 90.0)
        screen.began("a", three[0], 30.0)
        screen.began("b", three[1], 30.0)
    assert "3 runs to do, about 1 min 30 s" in said.get() and "started" not in said.get()
    table = drawn(screen)
    assert "dummy seed=0" in table and "dummy seed=1" in table and "dummy seed=2" not in table
    assert "0 of 3 done, 1 waiting" in table and "left" in table
    with screen.console.capture() as said:
        screen.ended("a", "finished", "", {"peak_bytes": 2e9})
        screen.ended("b", "failed", "ValueError: [no] markup", {})
    assert "peak 2 GB" in said.get() and "ValueError: [no] markup" in said.get()
    assert "2 of 3 done, 1 failed, 1 waiting" in drawn(screen)


def test_what_is_left_shrinks_with_runs_side_by_side_and_is_silent_when_unknown(three: list[Point]) -> None:
    screen = SweepScreen(Console(force_terminal=True, quiet=True))
    screen.announce(3, 90.0)
    screen.began("a", three[0], 30.0)
    now = screen._running["a"][1]
    assert screen.left_s(now) == pytest.approx(90.0)
    assert screen.left_s(now + 10) == pytest.approx(80.0)
    assert screen.left_s(now + 500) == pytest.approx(60.0), "a run that takes longer than expected counts as expected"
    screen.announce(3, None)
    assert screen.left_s(now) is None


def test_the_table_never_outgrows_the_terminal(three: list[Point]) -> None:
    screen = SweepScreen(Console(force_terminal=True, color_system=None, width=100, height=8))
    for number in range(12):
        screen._running[str(number)] = (three[number % 3], 0.0, None)
    table = drawn(screen)
    assert len(table.splitlines()) <= 8 and "10 more running" in table


def test_without_a_terminal_there_are_plain_lines(three: list[Point], capsys: pytest.CaptureFixture[str]) -> None:
    screen = SweepScreen(Console(force_terminal=False, width=100))
    with screen.shown():
        screen.began("a", three[0], None)
        screen.ended("a", "lost", "lost with its node", {})
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "started  dummy seed=0"
    assert lines[1].startswith("lost     dummy seed=0") and lines[1].endswith("lost with its node")
