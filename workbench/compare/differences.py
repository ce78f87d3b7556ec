"""What differs between two runs beside their results, and which comparisons that makes doubtful.

Parameters that differ are what a comparison is about. Everything else that differs competes with them as the cause
of a change: each such *difference* names the groups of metrics that it may have moved. One thing is
refused: times of a run that read experts from the disk beside times of one that read them from memory (page cache).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from emoe_core.errors import ExperimentError
from workbench.compare.change import Change
from workbench.machine.busy import busy_warning
from workbench.metrics.catalogue import GROUPS, OTHER, metric_of
from workbench.tracking.notebook import notebook_hash
from workbench.tracking.record import RunRecord
from workbench.tracking.runs import PAGE_CACHE_TAG

EVERYTHING = GROUPS
TIME = ("time",)
MACHINE = ("time", "memory")
ROUNDING = ("quality", OTHER)
# Of the environment: its field, what people call it, the groups it may have moved, and why.
FIELDS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("model_hash", "model", EVERYTHING, "other weights; quality is relative to each model's own reference"),
    ("data_hash", "data", EVERYTHING, "other prompts"),
    ("seed", "seed", EVERYTHING, "another draw of prompts and of what is random"),
    ("dtype", "data type", EVERYTHING, "other rounding and speed"),
    ("cpu", "processor", (*MACHINE, *ROUNDING), "another machine"),
    ("cpu_flags", "instruction sets", (*TIME, *ROUNDING), "other kernels: other speed and rounding"),
    ("cores", "cores", TIME, "another share of the machine"),
    ("threads", "threads", (*TIME, *ROUNDING), "other speed, and sums round differently"),
    ("ram_bytes", "memory of the machine", TIME, "another machine"),
    ("gpus", "GPU", EVERYTHING, "another device"),
    ("platform", "system", MACHINE, "another kernel or C library"),
    ("python", "Python", TIME, "another interpreter"),
    ("determinism", "determinism settings", ROUNDING, "libraries may compute in another order"),
    ("lock_hash", "installed packages", (), "see requirements.txt of the runs"),
    ("commit", "commit", EVERYTHING, "other code"),
)
# What rows paired by prompt are free of: a pair is the same prompt, whatever else the streams held.
NOT_OF_PAIRS = ("data_hash",)
# Libraries that compute; versions of the others are told without doubt.
COMPUTING = ("torch", "transformers", "numpy", "tokenizers", "safetensors")
SHOWN_HASH = 12


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes
    ----------
    what, a, b : str
        What, and its values.
    doubts : tuple of str
        The groups of metrics that it makes doubtful, may be none.
    why : str
    spares_pairs : bool
        Whether it leaves values that are paired by prompt in no doubt.
    """

    what: str
    a: str
    b: str
    doubts: tuple[str, ...] = ()
    why: str = ""
    spares_pairs: bool = False

    @property
    def doubt(self) -> str:
        """What it makes doubtful and why, in words; empty when nothing."""
        if not self.doubts:
            return ""
        named = "everything" if set(self.doubts) == set(EVERYTHING) else " and ".join(sorted(self.doubts))
        return f"{named}{' not paired by prompt' if self.spares_pairs else ''}: {self.why}"


def parameter_differences(a: RunRecord, b: RunRecord) -> list[Difference]:
    """Return the parameters that differ, one that only one run recorded included."""
    names = dict.fromkeys([*a.params, *b.params])
    return [
        Difference(name, _text(a.params.get(name, "not recorded")), _text(b.params.get(name, "not recorded")))
        for name in names
        if a.params.get(name, _MISSING) != b.params.get(name, _MISSING)
    ]


def other_differences(a: RunRecord, b: RunRecord) -> list[Difference]:
    """Return what differs beside parameters and results, the doubtful first."""
    found = environment_differences(a.environment, b.environment)
    sources = [None if run.notebook is None else notebook_hash(run.notebook) for run in (a, b)]
    if None not in sources and sources[0] != sources[1] and a.notebook_name == b.notebook_name:
        found.append(Difference("notebook's code", str(sources[0]), str(sources[1]), EVERYTHING, "other code"))
    if a.notebook_name != b.notebook_name:
        why = "metrics of one name may mean different things"
        names = [run.notebook_name or "run by hand" for run in (a, b)]
        # A run by hand does not say its notebook: that alone is no doubt.
        doubts = EVERYTHING if a.notebook_name and b.notebook_name else ()
        found.append(Difference("notebook", names[0], names[1], doubts, why if doubts else ""))
    found += [*_busy(a, b), *_page_cache(a, b)]
    return sorted(found, key=lambda item: not item.doubts)


def environment_differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Return what differs between two recorded environments."""
    if not a or not b:
        told = ["recorded" if environment else "not recorded" for environment in (a, b)]
        return [Difference("environment", told[0], told[1], EVERYTHING, "what a run ran on is not known")]
    found = [
        Difference(words, _text(a.get(name)), _text(b.get(name)), doubts, why, name in NOT_OF_PAIRS)
        for name, words, doubts, why in FIELDS
        if name in a and name in b and a[name] != b[name]
    ]
    if a.get("dirty") or b.get("dirty"):
        told = ["modified" if environment.get("dirty") else "as committed" for environment in (a, b)]
        found.append(Difference("code", told[0], told[1], EVERYTHING, "what exactly ran is not recorded"))
    same_data = a.get("data_hash") == b.get("data_hash")
    # The hash is of the whole stream: where prompts differ it differs anyway, and pairs are judged one by one.
    references = [environment.get("reference_hash") for environment in (a, b)]
    if same_data and references[0] != references[1]:
        why = "quality was scored on other continuations"
        found.append(Difference("reference", _text(references[0]), _text(references[1]), ("quality",), why))
    versions = [environment.get("packages", {}) for environment in (a, b)]
    for name in sorted(set(versions[0]) | set(versions[1])):
        told = [packages.get(name, "absent") for packages in versions]
        if told[0] != told[1]:
            doubts = (*MACHINE, *ROUNDING) if name in COMPUTING else ()
            found.append(Difference(name, told[0], told[1], doubts, "other speed and rounding" if doubts else ""))
    return found


def doubted(differences: Iterable[Difference], *, by_prompt: bool = False) -> set[str]:
    """Return the groups of metrics that differences make doubtful, of values paired by prompt or of all others."""
    return {group for item in differences if not (by_prompt and item.spares_pairs) for group in item.doubts}


def is_doubtful(change: Change, differences: Iterable[Difference]) -> bool:
    """Say whether a difference may have moved a metric."""
    return metric_of(change.metric).group in doubted(differences, by_prompt=change.by_prompt)


def reads_of(run: RunRecord) -> str | None:
    """Return how the timed part of a run read experts: "disk", "memory", or None where the run does not say."""
    said = run.tags.get(PAGE_CACHE_TAG)
    if said is None:
        return None
    return "disk" if "direct reads" in said else "memory"


def refuse_warm_beside_cold(a: RunRecord, b: RunRecord) -> None:
    """Raise when both runs hold times and one read experts from the disk, the other from memory.

    Raises
    ------
    ExperimentError
        Says which run did what, and how to go on.
    """
    reads = [reads_of(run) for run in (a, b)]
    timed = all(any(metric_of(name).group == "time" for name in run.metrics) for run in (a, b))
    if None in reads or reads[0] == reads[1] or not timed:
        return
    cold, warm = (a, b) if reads[0] == "disk" else (b, a)
    raise ExperimentError(
        f"{cold.describe()} read experts from the disk (cold), {warm.describe()} from memory or through the page cache "
        f"(warm: {warm.tags[PAGE_CACHE_TAG]}): their times cannot be compared. Make the second one again where direct "
        "reads work (`emoe doctor` says where), or compare everything but times with --without-times."
    )


def _busy(a: RunRecord, b: RunRecord) -> list[Difference]:
    shares = [run.metrics.get("others_cpu_share", run.metrics.get("fresh_others_cpu_share")) for run in (a, b)]
    told = ["not recorded" if share is None else f"others took {share:.0%}" for share in shares]
    busy = [name for name, share in zip("AB", shares, strict=True) if busy_warning(share)]
    if busy:
        why = f"{' and '.join(busy)} ran on a busy machine: times are unreliable"
        return [Difference("other work", told[0], told[1], TIME, why)]
    return []


def _page_cache(a: RunRecord, b: RunRecord) -> list[Difference]:
    reads = [reads_of(run) for run in (a, b)]
    if reads[0] == reads[1]:
        return []
    told = ["not recorded" if how is None else f"from {how}" for how in reads]
    return [Difference("reading experts", told[0], told[1], TIME, "the page cache may have served one of them")]


def _text(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:SHOWN_HASH] if re.fullmatch(r"[0-9a-f]{40,}", text) else text


_MISSING = object()
