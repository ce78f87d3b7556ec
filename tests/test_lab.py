"""Integration: the explore notebook in a real JupyterLab, driven by a real browser."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workbench.models.reference.tiny import tiny_moe

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e '.[dev]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-this-test"
PATIENCE_S = 240.0
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
PLACES = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "EMOE_CACHE")
SETTINGS = {
    # Cells outside the window are drawn too, so that they can be looked at.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false"},
}
SMALL = {"n_prompts": "2", "warm_prompts": "0", "max_new_tokens": "5", "budget": '"50%"'}


def small_copy(folder: Path, model: Path) -> Path:
    """Copy the notebook and its pairing, for a tiny model and without outputs."""
    shutil.copy(ROOT / "notebooks" / "jupytext.toml", folder)
    notebook = nbformat.read(ROOT / "notebooks" / "00_explore.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            values = SMALL | {"model": repr(str(model))}
            cell.source += "".join(f"\n{name} = {value}" for name, value in values.items())
    nbformat.write(notebook, folder / "00_explore.ipynb")
    return folder / "00_explore.ipynb"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Return the address of a JupyterLab of its own, and the notebook in it."""
    home, folder = tmp_path_factory.mktemp("lab-home"), tmp_path_factory.mktemp("lab")
    notebook = small_copy(folder, tiny_moe(home / "tiny", family="mixtral", seed=3))
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {name: str(home / name.lower()) for name in PLACES}
    for plugin, settings in SETTINGS.items():
        path = Path(places["JUPYTERLAB_SETTINGS_DIR"]) / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    environment = {
        **os.environ,
        **places,
        "EMOE_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        # The kernel "python3" is whatever python comes first.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"]
    log = home / "lab.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=stream, stderr=stream)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api/status?token={TOKEN}", server, log)
        yield address, notebook
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not come up: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def page(lab: tuple[str, Path]) -> Iterator[Any]:
    """Return a page with the notebook, all of its cells run."""
    address, notebook = lab
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(f"{address}/lab/tree/{notebook.name}?token={TOKEN}")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']")
        # Asked to run before its kernel is there, a notebook asks which one it should be.
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.locator(".lm-MenuBar-item", has_text="Run").click()
        page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        page.get_by_text("logged", exact=True).wait_for()
        idle.wait_for(state="attached")
        page.keyboard.press("Control+s")
        yield page
        browser.close()


def saved(notebook: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the notebook's code cells, once all were saved with what they gave, and the pair saved after it."""
    pair = notebook.parent / "source" / f"{notebook.stem}.py"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        if all(cell["execution_count"] for cell in cells) and pair.exists():
            return cells, pair.read_text()
        time.sleep(0.2)
    pytest.fail("the notebook was not saved with all of its cells run")


def slide(page: Any, name: str, key: str) -> None:
    """Press a key on a slider, and wait until the panel rests."""
    slider = page.locator(".widget-hslider", has=page.get_by_text(name, exact=True))
    slider.locator(".noUi-handle").press(key)


def test_all_cells_run_without_an_error_and_the_pair_is_written(lab: tuple[str, Path], page: Any) -> None:
    _, notebook = lab
    cells, pair = saved(notebook)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    assert cells[-1]["outputs"][0]["text"] == ["logged\n"]
    assert "panel = Panel(config)" in pair
    assert "logged\n" not in pair


def test_a_moved_slider_changes_figures_and_tokens(page: Any) -> None:
    figures, grid = page.get_by_text("perplexity ratio").first, page.locator(".widget-html svg").first
    page.locator(".widget-hslider").first.scroll_into_view_if_needed()
    before, drawn = figures.inner_text(), grid.get_attribute("aria-label")
    points = page.locator(".widget-html table tr", has_text="all tasks")
    assert points.count() == 1
    slide(page, "tolerance", "Home")
    playwright.expect(points).to_have_count(2, timeout=PATIENCE_S * 1000)
    assert figures.inner_text() != before
    assert "perplexity ratio 1.000, top-1 agreement 100.0%" in figures.inner_text()
    assert grid.get_attribute("aria-label") != drawn
    assert "0 rerouted" in grid.get_attribute("aria-label")


def test_a_budget_that_cannot_work_is_told_in_one_line(page: Any) -> None:
    slide(page, "budget (%)", "Home")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "bytes short. Pass at least" in alert.inner_text()
    slide(page, "budget (%)", "End")
    playwright.expect(alert).to_have_count(0, timeout=PATIENCE_S * 1000)
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0


def test_a_token_can_be_looked_at_closely(page: Any) -> None:
    assert page.get_by_text("Token 0", exact=True).count() == 1
    slide(page, "token", "End")
    page.get_by_text("Token 4", exact=True).wait_for()
