"""The page of a device sweep: what was tested, how fast each configuration decodes, and what a decode step consists of.

Figures are those of the records, beside the name of the device that gave them. Where that was no GPU the page says so
first, and nothing on it is a GPU's figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from workbench.metrics.show import markdown_table, show
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.runs import ERROR_TAG

REHEARSAL_TAG = "emoe.rehearsal"
COPIES = ("fill_bytes_per_s", "memcpy_bytes_per_s", "fill_share")
TESTS = {"tests.xml": "tests of CUDA", "tests-sanitizer.xml": "the same, watched by TORCH_CUDA_SANITIZER"}
SPEED = {
    "tokens/s": "tokens_per_s",
    "first token": "ttft_s",
    "of the long prompt": "long_ttft_s",
    "peak": "decode_peak_bytes",
    "with the long prompt": "device_peak_bytes",
    "hits": "hit_rate",
    "stalls": "stall_share",
    "waits a token": "host_waits_per_token",
    "of the engine": "engine_waits_per_token",
    "launches a token": "launches_per_token",
}
PROFILE_ROWS = 12


@dataclass(frozen=True)
class Tested:
    """Tests that ran once: what they were, and how many of each outcome."""

    name: str
    passed: int
    failed: int
    skipped: int


def tests_in(out: Path) -> list[Tested]:
    """Return the outcomes that pytest left in a folder (JUnit's XML)."""
    found = []
    for file, name in TESTS.items():
        if not (out / file).exists():
            continue
        suites = list(ElementTree.parse(out / file).getroot().iter("testsuite"))
        total, bad, skipped = (
            sum(int(suite.get(key, 0)) for suite in suites for key in keys)
            for keys in (("tests",), ("failures", "errors"), ("skipped",))
        )
        found.append(Tested(name, total - bad - skipped, bad, skipped))
    return found


def write_page(file: Path, records: Sequence[RecordedRun], tests: Sequence[Tested]) -> Path:
    """Write the page in Markdown, and return the file."""
    finished = [record for record in records if record.status == "FINISHED"]
    parts = [_head(records)]
    if tests:
        rows = [[one.name, one.passed, one.failed, one.skipped] for one in tests]
        parts.append("## Tests\n\n" + markdown_table(["", "passed", "failed", "skipped"], rows))
    for model in dict.fromkeys(_model(record) for record in finished):
        mine = [record for record in finished if _model(record) == model]
        parts.append(f"## Decoding, {model}\n\n" + _speeds(mine) + _copies(mine))
    ours = [record for record in finished if _is(record, system="emoe")]
    if ours:
        # A budget below all experts shows what loading them takes of a step.
        parts.append(_profile(next((record for record in ours if not _is(record, budget="100%")), ours[0])))
    errors = [record for record in records if record not in finished]
    if errors:
        parts.append("## Failed\n\n" + "\n".join(f"- {one.name}: {one.tags[ERROR_TAG]}" for one in errors))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


def _head(records: Sequence[RecordedRun]) -> str:
    if not records:
        return "# No run is recorded yet"
    environment = records[-1].environment
    gpus, packages = environment["gpus"], environment["packages"]
    rehearsal = next((record.tags[REHEARSAL_TAG] for record in records if REHEARSAL_TAG in record.tags), None)
    title = f"# REHEARSAL on {rehearsal}: no figure here is a GPU's" if rehearsal else f"# {', '.join(gpus)}"
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return (
        f"{title}\n\nDevice {records[-1].parameters['device']}; {environment['cpu']}, {environment['cores']} cores; "
        f"{versions}, Python {environment['python']}; commit {environment['commit'] or 'unknown'}. A process a row; "
        f"one sequence at a time."
    )


def _speeds(records: Sequence[RecordedRun]) -> str:
    resident = next((one for one in records if _is(one, system="emoe", budget="100%")), None)
    grouped = next((one for one in records if _is(one, system="stock-grouped_mm")), None)
    rows = []
    for one in records:
        given, ours = one.parameters, one.parameters["system"] == "emoe"
        settings = [given["budget"], given["tier"], f"{given['tolerance']:g}"] if ours else ["100%", "–", "–"]
        ratios = [_ratio(one, other) for other in (resident if ours else None, grouped)]
        figures = [show(name, one.metrics.get(name)) for name in SPEED.values()]
        rows.append([given["system"], *settings, figures[0], *ratios, *figures[1:]])
    heads = ["system", "experts", "tier", "tolerance", "tokens/s", "of own 100%", "of grouped", *list(SPEED)[1:]]
    long = records[0].parameters["long_prompt_tokens"], records[0].parameters["prompt_tokens"]
    return markdown_table(heads, rows) + f"\n\nFirst token of {long[1]:,} tokens; the long prompt has {long[0]:,}."


def _copies(records: Sequence[RecordedRun]) -> str:
    rows = [
        [one.parameters["tier"], *(show(name, one.metrics[name]) for name in COPIES)]
        for one in records
        if "fill_share" in one.metrics
    ]  # fmt: skip
    return "\n\n" + markdown_table(["tier", "loading all experts", "one large copy", "share"], rows) if rows else ""


def _profile(record: RecordedRun) -> str:
    table = record.tables["profile"]
    kept = [column for column in table.columns if column != "operation"]
    rows = [
        [f"`{row['operation'][:60]}`", *(f"{row[column]:,.1f}" for column in kept)]
        for row in table.head(PROFILE_ROWS).to_dict("records")
    ]
    heads = ["operation", *(column.replace("_", " ") for column in kept)]
    return f"## A decode step\n\n{record.name}.\n\n" + markdown_table(heads, rows)


def _model(record: RecordedRun) -> str:
    given = record.parameters
    scale = "" if given["scale"] == 1 else f" at scale {given['scale']:g}"
    return f"{given['shape']}{scale}" if given["shape"] else str(given["model"])


def _is(record: RecordedRun, **wanted: Any) -> bool:
    return all(record.parameters[name] == value for name, value in wanted.items())


def _ratio(record: RecordedRun, other: RecordedRun | None) -> str:
    return "–" if other is None else f"{record.metrics['tokens_per_s'] / other.metrics['tokens_per_s']:.2f}"
