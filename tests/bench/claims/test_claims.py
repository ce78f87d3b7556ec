"""Claims: values come from recorded runs, pages say what the results say, and a rerun is judged by the claim."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from sweep_bench import Bench

from emoe_core.errors import EmoeError, ExperimentError, OptionError
from workbench.claims import register as register_module
from workbench.claims.gallery import render_figures
from workbench.claims.register import Claim, Register, Results, read_register
from workbench.claims.rendering import CLAIMS_PAGE, SPAN, Source, pages, render_pages, rendered
from workbench.claims.reproduce import reproduce
from workbench.claims.verdicts import NOT, REPRODUCED, WITHIN, Verdict, read_verdicts, write_verdicts
from workbench.commands.claims import reproduce as reproduce_command
from workbench.results.export import export_sweep
from workbench.tracking.findings import PROMPTS_TAG
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.results_file import RESULTS, SweepResults, read_results, recorded_sweeps, write_results
from workbench.tracking.store import open_store

MOST_BYTES = 5_000_000
SIMPLE: dict[str, Any] = {
    "says": "The share is {value}.",
    "sweep": "dummy",
    "where": {"budget": "40%"},
    "metric": "hit_share",
    "within": 0.1,
    "gb": 1,
}


def claim(**changes: Any) -> Claim:
    return Claim(**SIMPLE | changes)


def recorded(place: int, budget: str, share: float, **metrics: float) -> RecordedRun:
    rows = pd.DataFrame({"policy": ["lru", "fifo"], "hits": [share, share / 2]})
    params = {"budget": budget, "seed": str(place)}
    return RecordedRun(
        f"{place:032x}",
        f"run {place}",
        "FINISHED",
        0,
        90_000,
        params,
        {"hit_share": share, **metrics},
        tables={"by": rows},
    )


@pytest.fixture
def results(tmp_path: Path) -> Results:
    runs = [
        recorded(1, "40%", 0.25),
        recorded(2, "40%", 0.75),
        recorded(3, "60%", 0.5, loss=1.5, loss_low=1.25, loss_high=2),
    ]
    write_results(SweepResults("dummy", "", runs), tmp_path / "results")
    return Results(tmp_path / "results")


def test_a_claim_s_value_is_the_mean_of_its_runs_beside_their_range(results: Results) -> None:
    found = claim(shown=".0%", holds=">= 0.6").found(results)
    assert (found.value.value, found.text, found.range_text, found.verdict) == (0.5, "50%", "25% to 75%", "failed")
    assert found.sentence == "The share is 50%."
    alone = claim(where={"budget": "60%"}, holds="== 0.5").found(results)
    assert (alone.value.value, alone.range_text, alone.verdict) == (0.5, "", "holds")
    cell = claim(metric="", table="by", row={"policy": "fifo"}, column="hits", where={"seed": 3}).found(results)
    assert cell.value.value == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"where": {"budget": "10%"}}, "have no run with"),
        ({"metric": "none"}, "has no 'none'"),
        ({"pooled": "drop 50%"}, "has no tables 'summary' and 'requests'"),
        ({"metric": "", "table": "by", "row": {}, "column": "hits"}, "has no 'hits'"),
        ({"sweep": "other"}, "holds no results of a sweep 'other'"),
    ],
)
def test_a_claim_without_its_runs_or_value_is_refused(results: Results, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        claim(**changes).found(results)


def test_prompts_of_all_seeds_are_taken_together(tmp_path: Path) -> None:
    runs = []
    for seed, losses in enumerate(([0.0, 0.2], [0.4, 0.6])):
        prompts = pd.DataFrame({"label": ["drop 50%"] * 2 + ["other"] * 2, "log_ratio_nats": losses * 2})
        requests = prompts.assign(output_tokens=10, kl_nats=prompts["log_ratio_nats"] / 2, top1_agreement=0.5)
        summary = pd.DataFrame(
            {"label": ["drop 50%", "other"], "budget": "50%", "perplexity_ratio": -1.0, "hits": seed}
        )
        tables = {"summary": summary, "requests": requests}
        runs.append(RecordedRun(f"{seed:032x}", "run", "FINISHED", 0, 1, {"seed": str(seed)}, tables=tables))
    write_results(SweepResults("dummy", "", runs), tmp_path)
    found = claim(where={}, metric="kl_nats", pooled="drop 50%").found(Results(tmp_path))
    assert found.value.value == pytest.approx(0.15)
    ratio = claim(where={}, metric="perplexity_ratio", pooled="drop 50%").found(Results(tmp_path))
    assert ratio.value.value == pytest.approx(math.exp(0.3)) and len(ratio.runs) == 2
    alone = claim(where={"seed": 1}, metric="perplexity_ratio", pooled="other").found(Results(tmp_path))
    assert alone.value.value == pytest.approx(math.exp(0.5))
    columns = [{"title": "budget", "param": "budget"}, {"title": "ratio", "metric": "perplexity_ratio", "shown": ".3f"}]
    table = {"sweep": "dummy", "pooled": True, "labels": ["drop 50%"], "columns": columns}
    source = Source(Register.model_validate({"tables": {"t": table}}), Results(tmp_path), {})
    assert "| 50% | 1.350 |" in rendered("<!--table t--><!--/-->", source, tmp_path / "p.md")
    with pytest.raises(ExperimentError, match="labelled 'none'"):
        claim(where={}, metric="kl_nats", pooled="none").found(Results(tmp_path))


def test_rows_of_a_recorded_table_stand_side_by_side_and_a_figure_takes_all_runs(tmp_path: Path) -> None:
    runs = []
    for place, slots in enumerate((4, 8)):
        rows = [
            {"predictor": name, "mix": mix, "slots": slots, "interval": p, "skill": 0.1 * p + 0.01 * slots}
            for name in ("frequency", "random")
            for mix in ("sticky", "drift")
            for p in (1, 8)
        ]
        tables = {"predictors": pd.DataFrame(rows)}
        params, tags = {"slots": str(slots)}, {PROMPTS_TAG: "6"}
        runs.append(RecordedRun(f"{place:032x}", "run", "FINISHED", 0, 1, params, tables=tables, tags=tags))
    write_results(SweepResults("dummy", "", runs), tmp_path)
    columns = [{"title": "predictor", "param": "predictor"}] + [
        {"title": mix, "metric": "skill", "of": {"mix": mix}, "shown": ".2f"} for mix in ("drift", "sticky", "none")
    ]
    picked = {"where": {"slots": 8}, "table": "predictors", "row": {"interval": 1}}
    table = {"sweep": "dummy", "columns": columns, **picked}
    figure = {"sweep": "dummy", "title": "Skills", "figure": "skill"}
    register = Register.model_validate({"tables": {"t": table}, "figures": {"f": figure}})
    text = rendered("<!--table t--><!--/-->", Source(register, Results(tmp_path), {}), tmp_path / "p.md")
    assert "| frequency | 0.18 | 0.18 | – |\n| random | 0.18 | 0.18 | – |" in text
    assert render_figures(register.figures, Results(tmp_path), tmp_path, write=True)
    shown = pd.read_csv(tmp_path / "figures" / "f.csv")
    assert set(shown["interval"]) == {1} and set(shown["slots"]) == {4, 8} and set(shown["prompts"]) == {6}
    assert (tmp_path / "figures" / "f-dark.svg").exists()
    assert render_figures(register.figures, Results(tmp_path), tmp_path, write=False) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"metric": ""},
        {"metric": "", "pooled": "a", "table": "b", "column": "c"},
        {"holds": "about 3"},
        {"within": -1},
        {"extra": 1},
    ],
)
def test_what_a_register_does_not_know_is_told_with_its_place(tmp_path: Path, entry: dict[str, Any]) -> None:
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump({"claims": {"one": SIMPLE | entry}}))
    with pytest.raises(ExperimentError, match=r"no register of claims(.|\n)*claims\.one"):
        read_register(file)
    with pytest.raises(ExperimentError, match="no register"):
        read_register(tmp_path / "none.yaml")


def test_pages_say_what_the_results_say_and_rendering_again_changes_nothing(results: Results, tmp_path: Path) -> None:
    table = {"sweep": "dummy", "columns": [
        {"title": "budget", "param": "budget", "named": {"60%": "three fifths"}},
        {"title": "loss", "metric": "loss", "shown": ".2f", "interval": True},
    ]}  # fmt: skip
    register = Register.model_validate({"claims": {"share": SIMPLE}, "tables": {"all": table}})
    source = Source(register, results, {"share": Verdict(REPRODUCED, 0.5, "2026-01-02", "abcdef0123", "2 cores of X")})
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "Ours is **<!--claim share-->old<!--/-->** (<!--range share--><!--/-->).\n\n<!--table all-->\n<!--/-->\n"
        "<!--recorded dummy--><!--/-->\n<!--claims all--><!--/-->\n<!--open all--><!--/-->\n"
        "<!--artifact all--><!--/-->\n"
    )
    assert render_pages([page], source, write=False) == [page] and "old" in page.read_text()
    assert render_pages([page], source, write=True) == [page]
    text = page.read_text()
    assert "#share)<!--/-->** (<!--range share-->25.0% to 75.0%<!--/-->)" in text
    assert "| three fifths | 1.50 (1.25 to 2.00) |" in text and "| 40% | – |" in text
    assert "3 runs, 1 January 1970" in text
    assert "`emoe reproduce share`" in text and "reproduced (50.0%), 2026-01-02, commit abcdef0" in text
    assert render_pages([page], source, write=True) == []
    with pytest.raises(EmoeError, match="unknown claim 'none'"):
        rendered("<!--claim none--><!--/-->", source, page)
    with pytest.raises(ExperimentError, match="kind 'cliam'"):
        rendered("<!--cliam share--><!--/-->", source, page)


def test_verdicts_are_kept_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert read_verdicts(tmp_path) == {}
    kept = {"b": Verdict(NOT, None, "2026-01-02", "c", "m"), "a": Verdict(WITHIN, 1.0, "2026-01-02", "c", "m")}
    assert list(read_verdicts(write_verdicts(kept, tmp_path).parent)) == ["a", "b"]
    assert read_verdicts(tmp_path) == kept
    (tmp_path / "verdicts.json").write_text("[")
    with pytest.raises(ExperimentError, match=r"verdicts\.json holds no verdicts"):
        read_verdicts(tmp_path)


def test_a_claim_is_run_again_and_judged_by_its_own_tolerance(bench: Bench, tmp_path: Path) -> None:
    sweep = bench.write(grid={"budget": ["40%", "60%"]})
    assert bench.emoe("sweep", str(sweep)).returncode == 0
    client = open_store()
    export_sweep(client, "dummy", tmp_path)
    found = read_results("dummy", tmp_path)
    # As if one had been recorded with another value.
    changed = [
        run if run.parameters["budget"] == "40%" else replace(run, metrics={**run.metrics, "slot_bytes": 8e8})
        for run in found.runs
    ]
    shutil.rmtree(tmp_path / "results", ignore_errors=True)
    write_results(SweepResults("dummy", "", changed), tmp_path)
    where = {"where": {"budget": "60%"}}
    claims = {
        "same": claim(),
        "near": claim(metric="slot_bytes", within=0.03, **where),
        "far": claim(metric="slot_bytes", within=0.01, **where),
        "cell": claim(metric="", table="requests", row={"prompt": 2}, column="ttft_s"),
    }
    told: list[str] = []
    again = {item.name: item.verdict.word for item in reproduce(client, claims, Results(tmp_path), told.append)}
    assert again == {"same": REPRODUCED, "near": WITHIN, "far": NOT, "cell": REPRODUCED}
    # Two runs, though four claims.
    assert sum(line.startswith("[") for line in told) == 2


def test_no_claim_to_run_is_no_success(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump({"claims": {"slow": SIMPLE}}))
    monkeypatch.setattr(register_module.read_register, "__defaults__", (file,))
    with pytest.raises(OptionError, match="no claim is marked quick"):
        reproduce_command(quick=True)
    with pytest.raises(OptionError, match="name claims, or give --quick"):
        reproduce_command()


def test_what_ships_is_small_and_every_page_says_what_it_holds() -> None:
    assert sum(file.stat().st_size for file in RESULTS.glob("*")) <= MOST_BYTES
    register, results = read_register(), Results()
    source = Source(register, results, read_verdicts())
    assert [str(page) for page in render_pages(pages(), source, write=False)] == []
    assert render_figures(register.figures, results, CLAIMS_PAGE.parent, write=False) == []
    spans = "".join(page.read_text(encoding="utf-8") for page in pages())
    shown = {name for kind, name, _ in SPAN.findall(spans) if kind in ("claim", "range", "table")}
    assert shown <= {*register.claims, *register.tables}
    assert {claim.sweep for claim in register.claims.values()} <= set(recorded_sweeps())
