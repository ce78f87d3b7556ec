"""The report's site: what it shows, what it holds for download, and what it never does."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
from matplotlib.figure import Figure
from site_pages import Page, add_run
from sweep_bench import Bench

from emoe_core.errors import ExperimentError
from workbench.metrics.catalogue import GROUP_MEANINGS, metric_of
from workbench.metrics.show import main_metrics
from workbench.report import section as sections
from workbench.report import write_report
from workbench.report.metric_tables import place_of
from workbench.report.section import Section
from workbench.report.sweep_page import read_sweep_page
from workbench.tracking import run as tracking
from workbench.tracking.place import HOME_VARIABLE
from workbench.tracking.runs import METRICS_TAG, find_parent
from workbench.tracking.store import open_store


def section(bench: Bench, name: str | None = None) -> Section:
    """Return the first section of a sweep's page."""
    client = open_store()
    return read_sweep_page(client, find_parent(client, name), bench.root / "scratch").sections[0]


def targets(site: Path) -> list[tuple[Path, str, Path]]:
    """Return (page, address, file) of every local address of a site."""
    found = []
    for page in sorted(site.rglob("*.html")):
        for address in Page(page).addresses:
            if not address.startswith("data:"):
                found.append((page, address, page.parent / unquote(address)))
    return found


@pytest.fixture(scope="module")
def written(swept: Bench) -> Path:
    """Return the site of the sweep of three runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(swept.root))
        return write_report(swept.root / "deep" / "report").parent


def test_a_report_of_real_runs_shows_results_failures_and_provenance(written: Path) -> None:
    sweep = Page(written / "sweep-dummy.html")
    assert "1.18" in sweep.words and "peak (GB)" in sweep.words
    assert "failed: ValueError: the notebook's own <error>" in sweep.words
    assert "Kernel died" in sweep.words
    assert "m0" in sweep.words and "transformers" in sweep.words
    runs = [Page(path) for path in written.glob("runs/*/index.html")]
    finished = [page for page in runs if "environment.json" in page.words and "img" in page.tags]
    assert len(runs) == 3 and len(finished) == 1
    for term in ("Model hash", "Data hash", "Seed", "Cores, threads", "Commit", "Page cache"):
        assert term in finished[0].words
    assert "1 finished" in Page(written / "index.html").words


def test_a_report_fetches_nothing_and_all_it_names_is_there(written: Path) -> None:
    for page in written.rglob("*.html"):
        parsed = Page(page)
        assert not re.search(r"https?://|//[a-z]|@import|url\(", parsed.text)
        assert "script" not in parsed.tags and "iframe" not in parsed.tags
    found = targets(written)
    assert len(found) > 20
    for page, address, file in found:
        assert not address.startswith("/") and file.resolve().is_relative_to(written.resolve()), (page, address)
        assert file.is_file(), (page, address)


def test_downloads_parse_and_hold_the_runs(written: Path) -> None:
    table = pd.read_csv(written / "data" / "dummy-runs.csv")
    records = json.loads((written / "data" / "dummy-runs.json").read_text())
    assert sorted(table["status"]) == ["FAILED", "FAILED", "FINISHED"]
    assert [row["run_id"] for row in records] == table["run_id"].tolist()
    finished = next(row for row in records if row["status"] == "FINISHED")
    assert finished["peak_bytes"] == pytest.approx(1.18e9) and finished["env_model_hash"] == "m0"
    assert next(row for row in records if row["status"] == "FAILED")["perplexity_ratio"] is None
    assert (written / "report.json").is_file()


def test_text_from_the_store_is_escaped(bench: Bench) -> None:
    nasty = "<script>alert('x')</script>&\"q\""
    tags = {"emoe.error": nasty, "emoe.axes": "p", "emoe.notebook": nasty}
    closing = pd.DataFrame([(nasty,) * 4], columns=["what", "paper", "here", "why they differ"])
    tables = {"beside_paper": closing, "odd <b>&'name": closing}
    add_run(bench, nasty, nasty, metrics={"loads": 1}, tags=tags, tables=tables, p=nasty, fixed=nasty)
    client = open_store()
    client.set_tag(find_parent(client).info.run_id, "mlflow.note.content", nasty)
    site = write_report(bench.root / "report").parent
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) == 4
    for path, page in pages.items():
        assert "script" not in page.tags, path
        assert page.words.count(nasty) >= 2, path
    assert all(file.is_file() for _, _, file in targets(site))


def test_a_saving_without_quality_is_called_out(bench: Bench) -> None:
    add_run(bench, "saving", "one", metrics={"peak_bytes": 1e8})
    add_run(bench, "judged", "one", metrics={"peak_bytes": 1e8, "perplexity_ratio": 1.01})
    assert section(bench, "saving").unjudged and not section(bench, "judged").unjudged
    site = write_report(bench.root / "report").parent
    said = "did not measure quality"
    assert said in Page(site / "index.html").text and said in Page(site / "sweep-saving.html").text
    assert said not in Page(site / "sweep-judged.html").text
    assert said not in Page(write_report(bench.root / "report", sweeps=["judged"])).text


def test_savings_stand_beside_quality_time_and_bounds(report_site: Path) -> None:
    index = Page(report_site / "index.html")
    assert "LRU on demand" in index.words and "random subset" in index.words and "all resident" in index.words
    assert "Bounds that these runs did not measure: oracle." in index.words
    assert "1.020 (1.010 to 1.030)" in index.words
    drawn = sorted(path.name for path in (report_site / "figures").glob("points-front-1-*-dark.svg"))
    assert drawn == [f"points-front-1-{kind}-dark.svg" for kind in ("hits", "quality", "time")]
    points = pd.read_csv(report_site / "data" / "points-points.csv").set_index(["strategy", "budget"])
    # A budget of 60% is beaten by one of 40% in all three; nobody beats the exact ones, and bounds do not take part.
    assert points["on_front"].to_dict() == {
        ("lru", "100%"): True,
        ("lru", "40%"): True,
        ("frequency", "40%"): True,
        ("frequency", "60%"): False,
        ("random", "40%"): False,
    }


def test_a_runs_page_shows_who_was_resident(report_site: Path) -> None:
    pages = [page for page in report_site.glob("runs/*/index.html") if (page.parent / "data/residency.csv").exists()]
    assert len(pages) == 2
    for page in pages:
        parsed = Page(page)
        assert "Residency, layer by layer" in parsed.words
        assert any("figures/residency-" in address for address in parsed.addresses)
        table = pd.read_csv(page.parent / "data" / "residency.csv")
        assert table.equals(pd.read_parquet(page.parent / "data" / "residency.parquet"))


def test_the_papers_figures_are_gathered_from_all_runs(report_site: Path) -> None:
    paper = Page(report_site / "paper.html")
    for text in ("1.02 at 40%", "1.20 at 40%", "another model", "98%"):
        assert text in paper.words
    assert len(json.loads((report_site / "data" / "paper.json").read_text())) == 5
    assert "5 rows" in Page(report_site / "index.html").words


def test_notebooks_run_by_hand_have_a_page(bench: Bench) -> None:
    for number in (1, 2):
        with tracking.run("quickstart", f"by hand {number}") as run:
            run.log_metrics({"loads": number})
    site = write_report(bench.root / "report").parent
    page = Page(site / "sweep-notebooks_run_by_hand.html")
    assert "quickstart" in page.words
    assert [row["loads"] for row in json.loads((site / "data" / "notebooks_run_by_hand-runs.json").read_text())] == [2]


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
    assert metric_of(metric).group == group


def test_parameters_that_do_not_vary_are_stated_once(bench: Bench) -> None:
    tags = {"emoe.axes": "budget", METRICS_TAG: "loads"}
    for budget in ("20%", "60%"):
        add_run(bench, "s", budget, metrics={"loads": 1, "hits": 2}, tags=tags, budget=budget, seed=0)
    found = section(bench)
    assert found.fixed == [("seed", "0")]
    assert [column.name for column in found.main.columns] == ["budget", "loads"]
    assert found.full is not None
    assert [column.name for column in found.full.columns] == ["budget", "loads", "hits"]


def test_parameters_are_written_in_one_style(bench: Bench) -> None:
    params = {"limit": None, "skipping": False, "share": 0.5, "tasks": ["qa", None], "mix": "uniform"}
    add_run(bench, "s", "one", metrics={"loads": 1}, **params)
    site = write_report(bench.root / "report").parent
    words = " ".join(Page(site / "sweep-s.html").words.split())
    assert 'limit = null, skipping = false, share = 0.5, tasks = ["qa", null], mix = uniform' in words
    for page in (site / "sweep-s.html", *site.glob("runs/*/index.html")):
        assert "None" not in Page(page).words, page


def test_a_runs_page_says_what_its_metrics_mean_and_where_they_were_measured(bench: Bench) -> None:
    metrics = {"perplexity_ratio": 1.01, "slot_bytes": 1.02e9, "fresh_slot_bytes": 5.1e8, "stock_slot_bytes": 1.27e9}
    metrics |= {"fresh_serving_bytes": 4e8, "stock_serving_bytes": 1.6e9, "memory_ratio": 0.25}
    metrics |= {"fresh_bytes_loaded": 4_910_284_800, "bytes_loaded": 1.31e10}
    add_run(bench, "s", "one", metrics=metrics, dtype="float32", timing_dtype="bfloat16")
    page = Page(next((write_report(bench.root / "report").parent).glob("runs/*/index.html")))
    words = " ".join(re.sub(r"<[^>]+>", " ", page.text).split())
    assert "memory quality measurement (float32) fresh process (bfloat16) stock (bfloat16) compared" in words
    assert "slot bytes memory of the expert slots: the budget as allocated 1.02 GB 510 MB 1.27 GB" in words
    assert "bytes loaded expert bytes read 13.1 GB 4.91 GB" in words
    assert "The same configuration alone in a new process" in words and GROUP_MEANINGS["memory"] in page.words
    assert 'title="fresh_slot_bytes"' in page.text


def test_a_metric_is_of_the_place_that_its_name_says() -> None:
    metrics = ["fresh_tpot_s", "stock_tpot_s", "tpot_ratio", "stock_longest_tokens", "stock_tokens_ratio"]
    found = [place_of(name, metrics) for name in metrics]
    assert found[:3] == [("fresh", "tpot_s"), ("stock", "tpot_s"), ("both", "tpot_s")]
    assert found[4] == ("own", "stock_tokens_ratio")
    assert place_of("tpot_ratio", ["tpot_ratio"]) == ("own", "tpot_ratio")
    assert metric_of("every_prompt_kl_nats").meaning == metric_of("kl_nats").meaning != ""
    assert metric_of("output_tokens").meaning == ""


def test_superseded_runs_are_left_out(bench: Bench) -> None:
    add_run(bench, "s", "old", metrics={"loads": 1}, tags={"emoe.superseded": "true"})
    add_run(bench, "s", "new", metrics={"loads": 2})
    assert [row.name for row in section(bench).rows] == ["new"]


def test_figures_across_runs_are_drawn_for_both_grounds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run(bench, "s", "one", metrics={"loads": 3}, budget="20%")
    seen: list[pd.DataFrame] = []

    def draw(runs: pd.DataFrame) -> Figure:
        seen.append(runs)
        figure = Figure()
        figure.subplots().plot(runs["loads"])
        return figure

    monkeypatch.setitem(sections.FIGURES, "Loads <by> budget", draw)
    monkeypatch.setitem(sections.FIGURES, "Never", lambda runs: None)
    site = write_report(bench.root / "report").parent
    page = Page(site / "sweep-s.html")
    assert [table[["budget", "loads"]].values.tolist() for table in seen] == [[["20%", 3.0]]] * 2
    assert "Loads <by> budget" in page.words and "Never" not in page.words
    light, dark = (next((site / "figures").glob(f"s-1-*-{ground}.svg")).read_text() for ground in ("light", "dark"))
    assert "#1c2128" in light and "#e4e8ed" in dark and "#1c2128" not in dark


def test_a_new_report_takes_the_place_of_the_old_one_and_of_nothing_else(bench: Bench, tmp_path: Path) -> None:
    add_run(bench, "known", "one", metrics={})
    out = tmp_path / "report"
    write_report(out)
    (out / "left over.txt").touch()
    write_report(out)
    assert not (out / "left over.txt").exists()
    with pytest.raises(ExperimentError, match=r"no sweep named 'other'\. Sweeps: known"):
        write_report(out, sweeps=["other"])
    assert (out / "index.html").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ExperimentError, match="holds something else than a report"):
        write_report(tmp_path / "mine")
    with pytest.raises(ExperimentError, match=r"a report is a folder, not the file .*page\.html"):
        write_report(tmp_path / "page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mlruns", "report"]


def test_a_store_without_runs_is_an_error(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="holds no sweep and no run of a notebook"):
        write_report(tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_an_interval_that_few_prompts_do_not_have_is_a_dash(bench: Bench) -> None:
    low = {"perplexity_ratio": 1.25, "perplexity_ratio_low": math.nan, "perplexity_ratio_high": math.nan}
    for budget in ("20%", "60%"):
        add_run(bench, "s", budget, metrics=low | {"slot_share": 0.5, "slot_bytes": 1e9}, budget=budget)
    site = write_report(bench.root / "report").parent
    pages = [Page(site / "sweep-s.html"), *map(Page, site.glob("runs/*/index.html"))]
    for page in pages:
        words = re.sub(r"<[^>]+>", " ", page.text).split()
        assert {"1.250", "1.25"} & set(words) and "–" in words and "nan" not in words
