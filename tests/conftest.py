"""Fixtures that several tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Before torch is imported: tiny matrices on many threads, beside other test processes, mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
from sweep_bench import Bench

from emoe_core.errors import LimitError
from workbench.machine.control_groups import Controller, find_controller
from workbench.tracking.place import HOME_VARIABLE
from workbench.tracking.store import open_store

# How long an example takes says what else the machine does.
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")

# Files that start processes one after the other: begun first, so that no worker is left with one of them at the end.
SLOWEST = (
    "test_sweep",
    "test_verify",
    "test_report",
    "test_ray_executor",
    "test_replicas",
    "test_memory",
    "test_families",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def controller() -> Controller:
    """Return what sets hard memory limits here; skipped where nothing can."""
    try:
        return find_controller()
    except LimitError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project root whose store has its schema; writing one takes seconds."""
    root = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(root))
        open_store()
    return root


@pytest.fixture
def bench(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a project of its own for sweeps."""
    shutil.copytree(empty_store / "mlruns", tmp_path / "mlruns")
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def swept(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Return a project in which one sweep ran: of its three runs one finished, one raised, one crashed."""
    root = tmp_path_factory.mktemp("swept")
    shutil.copytree(empty_store / "mlruns", root / "mlruns")
    bench = Bench(root)
    path = bench.write(grid={"outcome": ["raise", "ok", "crash"]}, fixed={"budget": "60%"}, metrics=["peak_bytes"])
    bench.answer = bench.emoe("sweep", str(path), "--jobs", "3")
    return bench


@pytest.fixture(scope="session")
def report_site(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report of runs with operating points, residency, closing tables, and names that do not fit a phone."""
    from site_pages import add_long_names, operating_points

    from workbench.report import write_report

    root = tmp_path_factory.mktemp("site")
    shutil.copytree(empty_store / "mlruns", root / "mlruns")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(root))
        operating_points(Bench(root))
        add_long_names(Bench(root))
        return write_report(root / "report").parent
