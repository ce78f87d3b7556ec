"""For tests of the report: runs put into a store by hand, and pages taken apart."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
from sweep_bench import Bench

from workbench.machine.environment import describe_environment
from workbench.sweep.resume import start_parent
from workbench.tracking import run as tracking
from workbench.tracking.runs import find_parent
from workbench.tracking.store import encode, open_store


class Page(HTMLParser):
    """The tags and addresses of a page, and its words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

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
    tables: dict[str, pd.DataFrame] | None = None,
    **params: object,
) -> str:
    """Add a finished run to a sweep of the bench's store, the sweep made if missing, and return its id."""
    client = open_store()
    parent = find_parent(client, sweep)
    parent_id = parent.info.run_id if parent else start_parent(client, sweep, {})
    every = {"emoe.notebook": "book"} | (tags or {})
    run_id = tracking.new_run(client, sweep, label, parent=parent_id, tags=every)
    for name, value in params.items():
        client.log_param(run_id, name, encode(value))
    for name, number in metrics.items():
        client.log_metric(run_id, name, number)
    if tables:
        run = tracking.Run(client, run_id, describe_environment(seed=0, model_hash="m0", data_hash="d0"))
        for name, table in tables.items():
            run.log_frame(name, table)
    client.set_terminated(run_id, "FINISHED")
    return run_id


LONG = "an_identifier_of_a_run_that_is_longer_than_a_phone_is_wide_and_has_no_place_to_break_a_line_at"


def add_long_names(bench: Bench) -> None:
    """Add a sweep and a run whose names, error and parameters are longer than a phone is wide."""
    tags = {"emoe.error": LONG, "emoe.notebook": LONG}
    add_run(bench, LONG, LONG, metrics={"peak_bytes": 1e8, "tpot_s": 0.1}, tags=tags, tasks=LONG)


def operating_points(bench: Bench, sweep: str = "points") -> None:
    """Add runs with memory, quality and time: everything resident, LRU on demand, a predictor, a random subset."""
    rows = [
        ("lru", "100%", 0.0, 1.0, 1.0, 1.0, 1.0),
        ("lru", "40%", 0.0, 0.4, 0.45, 1.0, 2.0),
        ("frequency", "40%", 1.0, 0.4, 0.45, 1.02, 1.1),
        ("frequency", "60%", 1.0, 0.6, 0.65, 1.03, 1.2),
        ("random", "40%", 1.0, 0.4, 0.45, 1.2, 1.1),
    ]
    for strategy, budget, tolerance, share, memory, ratio, tpot in rows:
        metrics = {
            "slot_share": share,
            "memory_ratio": memory,
            "tpot_ratio": tpot,
            "perplexity_ratio": ratio,
            "perplexity_ratio_low": ratio - 0.01 * tolerance,
            "perplexity_ratio_high": ratio + 0.01 * tolerance,
            "kl_nats": ratio - 1,
            "replayed_lru_hit_rate": share,
            "replayed_belady_hit_rate": share**0.5,
            "replayed_random_hit_rate": share * 0.9,
        }
        known = {"strategy": strategy, "budget": budget, "tolerance": tolerance, "model": "tiny", "mix": "uniform"}
        residency = pd.DataFrame(
            {"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "resident_share": [1.0, 0, 0.5, 0.5], "wanted_share": 0.5}
        )
        closing = pd.DataFrame(
            [("Fig. 14", "98%", f"{ratio:.2f} at {budget}", "another model")],
            columns=["what", "paper", "here", "why they differ"],
        )
        tables = {"beside_paper": closing} | ({"residency": residency} if strategy == "frequency" else {})
        add_run(bench, sweep, f"{strategy} {budget}", metrics=metrics, tables=tables, **known)
