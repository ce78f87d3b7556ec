"""Recorded traffic: the public request traces of Azure (2023, csv) and Mooncake (jsonl).

Azure LLM inference 2023: columns ``TIMESTAMP,ContextTokens,GeneratedTokens``; one file for conversation, one for code.
Mooncake: one JSON object a line with ``timestamp`` (milliseconds), ``input_length`` and ``output_length``.

Both say when requests came and how long they were, not what they said. The task is the file's where its name says so
(``conv``, ``code``), else drawn by seed from the given tasks. Lengths above the model's limits are cut, and the number
of cut requests is told. The files are not part of this project: `trace_path` says where they are looked for.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from emoe_core.errors import DataError
from emoe_core.files import parse
from emoe_core.loader.cache_folder import cache_dir
from workbench.serving.simulation.arrivals import Arrival

KNOWN = {
    "azure_conv": ("azure_llm_2023_conv.csv", "AzureLLMInferenceTrace_conv.csv of Azure's public dataset, 2023"),
    "azure_code": ("azure_llm_2023_code.csv", "AzureLLMInferenceTrace_code.csv of Azure's public dataset, 2023"),
    "mooncake": ("mooncake_trace.jsonl", "mooncake_trace.jsonl of the Mooncake project"),
}
AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
MOST_TOKENS = 10**9
MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True)
class RequestTrace:
    """Recorded arrivals, and how many had a length cut."""

    arrivals: list[Arrival]
    cut: int


def trace_path(name: str, folder: str | Path | None = None) -> Path:
    """Return the file of a known trace, or the path itself.

    Parameters
    ----------
    name : str
        "azure_conv", "azure_code", "mooncake", or the path of a file in one of their formats.
    folder : str or Path, optional
        Where known traces lie; ``traces`` in the cache if not given.

    Raises
    ------
    DataError
        When there is no such file; the message says which one to put where.
    """
    if name not in KNOWN:
        path = Path(name)
        if not path.is_file():
            raise DataError(f"there is no request trace at {path}: give a csv or jsonl file, or {', '.join(KNOWN)}")
        return path
    file, origin = KNOWN[name]
    path = Path(folder) / file if folder else cache_dir() / "traces" / file
    if not path.is_file():
        raise DataError(f"the request trace {name!r} is not at {path}: put {origin} there under that name")
    return path


def read_trace(
    path: Path,
    tasks: Sequence[str],
    *,
    most: int | None = None,
    max_input_tokens: int | None = None,
    max_output_tokens: int | None = None,
    seed: int = 0,
) -> RequestTrace:
    """Read a trace, in order of arrival, the first request at time 0.

    Parameters
    ----------
    path : Path
        ``.jsonl`` is read as Mooncake's format, anything else as Azure's.
    tasks : sequence of str
        Tasks to draw from where the file's name tells none.
    most : int, optional
        Only so many requests, from the start.
    max_input_tokens, max_output_tokens : int, optional
        Longer ones are cut to this.
    seed : int

    Raises
    ------
    DataError
        When a line cannot be read; the message names it.
    """
    rows = _read_mooncake(path) if path.suffix == ".jsonl" else _read_azure(path)
    rows.sort(key=lambda row: row[0])
    rows = rows[:most]
    if not rows:
        raise DataError(f"{path} holds no requests")
    named = _task_of(path.stem, tasks)
    drawn = np.random.default_rng([seed, 3]).integers(len(tasks), size=len(rows))
    arrivals, cut = [], 0
    for number, (moment, entered, given) in enumerate(rows):
        short = min(entered, max_input_tokens or entered), min(given, max_output_tokens or given)
        cut += short != (entered, given)
        task = named or tasks[int(drawn[number])]
        arrivals.append(Arrival(number, task, moment - rows[0][0], *short))
    return RequestTrace(arrivals, cut)


def merge(traces: Sequence[RequestTrace]) -> RequestTrace:
    """Return several traces as one, each from its own start, numbered anew in order of arrival."""
    every = sorted((arrival for trace in traces for arrival in trace.arrivals), key=lambda one: one.arrival_s)
    numbered = [Arrival(number, a.task, a.arrival_s, a.input_tokens, a.output_tokens) for number, a in enumerate(every)]
    return RequestTrace(numbered, sum(trace.cut for trace in traces))


def _task_of(stem: str, tasks: Sequence[str]) -> str | None:
    for sign, task in (("conv", "conversation"), ("code", "code")):
        if sign in stem.lower().split("_") and task in tasks:
            return task
    return None


def _read_azure(path: Path) -> list[tuple[float, int, int]]:
    rows = []
    reader = csv.reader(_lines(path))
    try:
        if next(reader, [])[:3] != AZURE_COLUMNS:
            raise DataError(f"{path} is no Azure trace: its first line should be {','.join(AZURE_COLUMNS)}")
        for row in reader:
            # Seven digits of a second in the file; Python reads six.
            rows.append(_request(datetime.fromisoformat(row[0][:26]).timestamp(), row[1], row[2]))
    except (csv.Error, ValueError, IndexError, OverflowError, OSError) as error:
        raise DataError(f"{path}, line {reader.line_num} is no request ({error})") from error
    return rows


def _read_mooncake(path: Path) -> list[tuple[float, int, int]]:
    rows = []
    for line, text in enumerate(_lines(path), start=1):
        if not text.strip():
            continue
        try:
            entry = parse(text)
            moment, entered, given = (entry[name] for name in MOONCAKE_FIELDS)
            rows.append(_request(float(moment) / 1000.0, entered, given))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path}, line {line} is no request with {', '.join(MOONCAKE_FIELDS)} ({error!r:.200})"
            ) from error
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a request trace: {error}") from error


def _request(moment_s: float, entered: str | int, given: str | int) -> tuple[float, int, int]:
    """Return a request's moment and lengths; ValueError or OverflowError where they make no sense."""
    lengths = int(entered), int(given)
    if not math.isfinite(moment_s) or max(lengths) > MOST_TOKENS:
        raise ValueError("its moment or a length is out of range")
    return moment_s, max(1, lengths[0]), max(1, lengths[1])
