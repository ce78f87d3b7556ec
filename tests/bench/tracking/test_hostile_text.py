"""Foreign text in pages and names: it is shown as it is, and names no file elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

import emoe_core
from emoe_core.errors import ExperimentError
from emoe_core.metrics import Counters, RunStats
from workbench.cli import app
from workbench.explore.displays import engine_html, stats_html
from workbench.models.reference.tiny import tiny_moe
from workbench.sweep.file import read_sweep
from workbench.tracking.notebook import find_notebook
from workbench.tracking.store import slug

HOSTILE = "<img src=x onerror=alert(1)>&amp;'\""
# What our own HTML is made of.
SHOWN = {"b", "details", "div", "p", "path", "span", "summary", "svg", "table", "td", "tr"}


class Page(HTMLParser):
    """The tags of a page, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_statistics_escape_names_and_texts() -> None:
    stats = RunStats(
        counters=Counters(),
        experts=1,
        slots=1,
        resident_experts=1,
        slot_bytes=1,
        expert_bytes=1,
        dense_bytes=1,
        top_k_share=0.5,
        tolerance=0.0,
        on_miss="reroute",
        policy="lru",
        predictor=HOSTILE,
        interval=1,
        cold_start=True,
        storage=HOSTILE,
        requests_served=0,
        compute=HOSTILE,
        rerouting=HOSTILE,
        extra={HOSTILE: 1.0},
    )
    page = Page(stats_html(stats))
    assert page.tags <= SHOWN
    assert page.words.count(HOSTILE) == 5


def test_an_engine_escapes_the_name_of_its_folder(tmp_path: Path) -> None:
    with emoe_core.load(tiny_moe(tmp_path / HOSTILE), budget="50%", pack_dir=tmp_path) as engine:
        page = Page(engine_html(engine))
    assert page.tags <= SHOWN
    assert HOSTILE in page.words


def test_a_terminal_shows_names_that_look_like_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    model, out = tiny_moe(tmp_path / "[/b]"), tmp_path / "[red]" / "[/x].emoe"
    packed = CliRunner().invoke(app, ["model", "pack", str(model), "--out", str(out)])
    assert packed.exit_code == 0, packed.exception
    assert str(out) in packed.stdout


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../b", "/etc/passwd", "x\0y", "..\\..\\x"])
def test_a_slug_names_a_file_in_its_own_folder(tmp_path: Path, name: str) -> None:
    place = tmp_path / slug(name)
    assert place.resolve().parent == tmp_path.resolve()
    place.write_text("")


@pytest.mark.parametrize("name", ["../x", "..", "a/b", ".hidden", "", "x\n"])
def test_a_sweep_is_named_like_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"name: {name!r}\nnotebook: x.ipynb\nkind: quality\n".replace("'x\\n'", '"x\\n"'))
    with pytest.raises(ExperimentError, match="name"):
        read_sweep(path)


def test_a_notebook_that_climbs_out_of_the_project_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOE_HOME", str(tmp_path / "project"))
    sweeps = tmp_path / "project" / "sweeps"
    sweeps.mkdir(parents=True)
    for place in (tmp_path, tmp_path / "project", sweeps):
        (place / "book.ipynb").write_text("{}")
    assert find_notebook("book.ipynb", sweeps) == tmp_path / "project" / "book.ipynb"
    (tmp_path / "project" / "book.ipynb").unlink()
    assert find_notebook("book.ipynb", sweeps) == sweeps / "book.ipynb"
    assert find_notebook(str(tmp_path / "book.ipynb"), sweeps) == tmp_path / "book.ipynb"
    with pytest.raises(ExperimentError, match="leads out"):
        find_notebook("../book.ipynb", sweeps)


def test_aliases_that_stand_for_more_than_memory_holds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]
    path.write_text("\n".join(lines))
    with pytest.raises(ExperimentError, match="aliases stand for more"):
        read_sweep(path)
    path.write_text("name: &a [*a]")
    with pytest.raises(ExperimentError, match="part of"):
        read_sweep(path)
