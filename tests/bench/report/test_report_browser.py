"""Integration: every page of a real report in Chromium, opened from the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pandas as pd
import pytest
from site_pages import add_run
from sweep_bench import Bench

from workbench.report import write_report

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a running Chromium; skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra `dev`)")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=list(OPTIONS))
        yield running
        running.close()


@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")], ids=["phone-dark", "desktop-light"])
def test_every_page_is_quiet_readable_and_stays_on_the_disk(
    browser: Any, report_site: Path, size: dict[str, int], scheme: str
) -> None:
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
    page.on("request", lambda request: asked.append(request.url))
    for path in sorted(report_site.rglob("*.html")):
        page.goto(path.as_uri())
        # Also what is loaded late, and what is folded away.
        page.evaluate("document.querySelectorAll('details').forEach(item => item.open = true)")
        page.evaluate("document.querySelectorAll('img').forEach(item => item.loading = 'eager')")
        page.wait_for_function("[...document.images].every(item => item.complete && item.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, path
        ground, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert contrast(ground, ink) > 7, path
        assert (brightness(ground) < 0.5) == (scheme == "dark"), path
        shown = page.evaluate("[...document.querySelectorAll('img.drawn')].map(item => item.currentSrc)")
        assert all(address.endswith(f"-{scheme}.svg") for address in shown), path
        if size == PHONE:
            # Nearly as large as the reader chose letters to be.
            size_of = "(item => parseFloat(getComputedStyle(item).fontSize))"
            share = f"{size_of}(document.querySelector('p, dd')) / {size_of}(document.documentElement)"
            assert page.evaluate(share) >= 0.85, path
    assert said == []
    assert {urlparse(address).scheme for address in asked} <= {"file", "data"}
    for address in asked:
        if address.startswith("file:"):
            assert Path(unquote(urlparse(address).path)).is_relative_to(report_site), address
    context.close()


def test_wide_figures_and_lists_of_files_have_the_room_they_need(browser: Any, bench: Bench, tmp_path: Path) -> None:
    counts = {"hits": 5.0, "loads": 3.0, "reroutes": 2.0, "lookups": 10.0, "slot_bytes": 1e9}
    tables = {f"table_of_many_{number}_letters": pd.DataFrame({"x": [1]}) for number in range(5)}
    add_run(bench, "s", "one", metrics=counts, tables=tables, strategy="lru", budget="40%", tolerance=0.0)
    site = write_report(tmp_path / "report").parent
    sweep, run = site / "sweep-s.html", next(site.glob("runs/*/index.html"))
    page = browser.new_page(viewport=DESKTOP)
    page.goto(sweep.as_uri())
    # The figure, whole, is wider than half the page; nothing on it has to be scrolled.
    wide = "document.querySelector('figure img.wide')"
    assert page.evaluate(f"{wide}.loading = 'eager'") == "eager"
    page.wait_for_function(f"{wide}.complete && {wide}.naturalWidth > 0")
    assert page.evaluate(f"{wide}.clientWidth / window.innerWidth") > 0.5
    boxes = "[...document.querySelectorAll('figure, figure div')]"
    assert page.evaluate(f"{boxes}.filter(item => item.scrollWidth > item.clientWidth).length") == 0
    assert page.get_by_text("scroll it sideways").count() == 1 and not page.get_by_text("scroll it").is_visible()
    page.goto(run.as_uri())
    # A size at the end of a line and the next column's bullet, which hangs left of its text, stay apart.
    gap = "(item => parseFloat(getComputedStyle(item).columnGap) / parseFloat(getComputedStyle(item).fontSize))"
    assert page.evaluate(f"{gap}(document.querySelector('ul.files'))") >= 2
    page.set_viewport_size(PHONE)
    page.goto(sweep.as_uri())
    assert page.get_by_text("scroll it sideways").is_visible()
    assert page.evaluate(f"{wide}.clientWidth / window.innerWidth") > 1, "it is not shrunk until nobody can read it"
    page.close()


def test_a_reader_finds_the_way_from_the_overview_to_a_runs_data(browser: Any, report_site: Path) -> None:
    context = browser.new_context(viewport=PHONE, accept_downloads=True)
    page = context.new_page()
    page.goto((report_site / "index.html").as_uri())
    page.get_by_role("link", name="points", exact=True).first.click()
    assert page.get_by_role("heading", level=1).inner_text() == "points"
    page.get_by_role("row", name="decayed frequency").first.get_by_role("link", name="run").click()
    assert page.get_by_text("Model hash").is_visible()
    with page.expect_download() as waiting:
        page.get_by_role("link", name="data/residency.csv").click()
    assert Path(waiting.value.path()).read_text().startswith("layer,expert,resident_share,wanted_share")
    page.get_by_role("link", name="Paper and here").click()
    assert page.get_by_text("another model").first.is_visible()
    context.close()


def brightness(color: str) -> float:
    """Return the relative luminance of a colour as browsers write it, ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, 1 to 21 (WCAG)."""
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)
