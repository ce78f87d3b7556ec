from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from sweep_bench import Bench
from workbench.report_section import group_of, main_metrics

from emoe_core.errors import ExperimentError
from workbench import figures
from workbench.report import read_sweep_part, write_report
from workbench.store import HOME_VARIABLE, open_store
from workbench.sweep_state import METRICS_TAG, find_parent, start_parent
from workbench.tracking import new_run

# In the worker that runs the other sweeps: one sweep serves them all.
pytestmark = pytest.mark.xdist_group("sweep")


class Page(HTMLParser):
    """The tags and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words += data


def add_run(
    bench: Bench,
    sweep: str,
    label: str,
    *,
    metrics: dict[str, float],
    tags: dict[str, str] | None = None,
    **params: str,
) -> str:
    client = open_store()
    parent = find_parent(client, sweep)
    parent_id = parent.info.run_id if parent else start_parent(client, sweep, {})
    run_id = new_run(client, sweep, label, parent=parent_id, tags={"emoe.notebook": "book"} | (tags or {}))
    for name, value in params.items():
        client.log_param(run_id, name, value)
    for name, number in metrics.items():
        client.log_metric(run_id, name, number)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def test_a_report_of_real_runs_shows_results_failures_and_provenance(
    swept: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(swept.root))
    text = write_report(swept.root / "deep" / "report.html").read_text()
    page = Page(text)
    assert "1.18" in page.words and "peak (GB)" in page.words
    assert "failed: ValueError: the notebook's own <error>" in page.words
    assert "Kernel died" in page.words
    assert "m0" in page.words and "transformers" in page.words
    assert page.tags.count("img") == 1


def test_a_report_fetches_nothing(swept: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(swept.root))
    text = write_report(swept.root / "report.html").read_text()
    page = Page(text)
    assert page.addresses and all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert "script" not in page.tags and "link" not in page.tags


def test_text_from_the_store_is_escaped(bench: Bench) -> None:
    nasty = "<script>alert('x')</script>&\"q\""
    tags = {"emoe.error": nasty, "emoe.axes": "p", "emoe.notebook": nasty}
    add_run(bench, "s", nasty, metrics={"loads": 1}, tags=tags, p=nasty, fixed=nasty)
    client = open_store()
    client.set_tag(find_parent(client).info.run_id, "mlflow.note.content", nasty)
    text = write_report(bench.root / "report.html").read_text()
    assert "script" not in Page(text).tags
    assert Page(text).words.count(nasty) >= 4


def test_a_saving_without_quality_is_called_out(bench: Bench) -> None:
    add_run(bench, "saving", "one", metrics={"peak_bytes": 1e8})
    add_run(bench, "judged", "one", metrics={"peak_bytes": 1e8, "perplexity_ratio": 1.01})
    client = open_store()
    assert read_sweep_part(client, find_parent(client, "saving")).sections[0].unjudged
    assert not read_sweep_part(client, find_parent(client, "judged")).sections[0].unjudged
    assert "did not measure quality" in write_report(bench.root / "report.html").read_text()
    assert "did not measure quality" not in write_report(bench.root / "r.html", sweeps=["judged"]).read_text()


def test_a_named_memory_metric_brings_quality_into_the_main_table() -> None:
    every = ["peak_bytes", "kl_nats", "perplexity_ratio", "tpot_s", "loads"]
    assert main_metrics([], every) == every
    assert main_metrics(["peak_bytes", "tpot_s"], every) == ["peak_bytes", "kl_nats", "perplexity_ratio", "tpot_s"]
    assert main_metrics(["kl_nats", "peak_bytes"], every) == ["peak_bytes", "kl_nats"]
    assert main_metrics(["loads"], every) == ["loads"]


@pytest.mark.parametrize(
    ("metric", "group"),
    [
        ("fresh_model_bytes", "memory"),
        ("memory_ratio", "memory"),
        ("top1_agreement", "quality"),
        ("perplexity_ratio_low", "quality"),
        ("tpot_ratio", "time"),
        ("swap_s", "time"),
        ("hit_rate", "other"),
        ("bytes_loaded", "other"),
    ],
)
def test_metrics_are_grouped_by_what_they_are_about(metric: str, group: str) -> None:
    assert group_of(metric) == group


def test_parameters_that_do_not_vary_are_stated_once(bench: Bench) -> None:
    tags = {"emoe.axes": "budget", METRICS_TAG: "loads"}
    for budget in ("20%", "60%"):
        add_run(bench, "s", budget, metrics={"loads": 1, "hits": 2}, tags=tags, budget=budget, seed="0")
    section = read_sweep_part(open_store(), find_parent(open_store())).sections[0]
    assert section.fixed == [("seed", "0")]
    assert [column.name for column in section.main.columns] == ["budget", "loads"]
    assert section.full is not None
    assert [column.name for column in section.full.columns] == ["budget", "loads", "hits"]


def test_superseded_runs_are_left_out(bench: Bench) -> None:
    add_run(bench, "s", "old", metrics={"loads": 1}, tags={"emoe.superseded": "true"})
    add_run(bench, "s", "new", metrics={"loads": 2})
    section = read_sweep_part(open_store(), find_parent(open_store())).sections[0]
    assert [row.name for row in section.rows] == ["new"]


def test_figures_across_runs_are_drawn_from_finished_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run(bench, "s", "one", metrics={"loads": 3}, budget="20%")
    seen: list[pd.DataFrame] = []

    def draw(runs: pd.DataFrame) -> Figure:
        seen.append(runs)
        figure = Figure()
        figure.subplots().plot(runs["loads"])
        return figure

    monkeypatch.setattr(figures, "REPORT_FIGURES", figures.REPORT_FIGURES)
    monkeypatch.setitem(figures.REPORT_FIGURES, "Loads <by> budget", draw)
    monkeypatch.setitem(figures.REPORT_FIGURES, "Never", lambda runs: None)
    page = Page(write_report(bench.root / "report.html").read_text())
    assert seen[0][["budget", "loads"]].values.tolist() == [["20%", 3.0]]
    assert "Loads <by> budget" in page.words and "Never" not in page.words


def test_a_store_without_sweeps_or_without_the_named_one_is_an_error(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="holds no sweep"):
        write_report(tmp_path / "report.html")
    add_run(bench, "known", "one", metrics={})
    with pytest.raises(ExperimentError, match=r"no sweep named 'other'\. Sweeps: known"):
        write_report(tmp_path / "report.html", sweeps=["other"])
    assert not (tmp_path / "report.html").exists()
