"""What runs ran on, as terms and texts: machine, versions, source revision, and the identity of model and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workbench.metrics.show import show_bytes
from workbench.tracking.runs import PAGE_CACHE_TAG

NOTHING: tuple[Any, ...] = (None, "", [], {})


def provenance(environments: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what the runs ran on as (term, text); differing values are all listed."""
    if not environments:
        return []

    def values(get: Callable[[dict[str, Any]], Any]) -> str:
        found = list(dict.fromkeys(str(get(item)) for item in environments if get(item) not in NOTHING))
        return " / ".join(found) or "not recorded"

    def package(name: str) -> str:
        return values(lambda item: item["packages"].get(name))

    return [
        ("Model hash", values(lambda item: item["model_hash"])),
        ("Data hash", values(lambda item: item["data_hash"])),
        ("Continuations hash", values(lambda item: item.get("reference_hash"))),
        ("Seed", values(lambda item: item["seed"])),
        ("Data type", values(lambda item: item["dtype"])),
        ("Commit", values(lambda item: f"{item['commit'] or 'unknown'}{' (modified)' if item['dirty'] else ''}")),
        ("Processor", values(lambda item: item["cpu"])),
        ("Instruction sets", values(lambda item: ", ".join(item["cpu_flags"]))),
        ("Cores, threads", values(lambda item: f"{item['cores']}, {item['threads']}")),
        ("Memory", values(lambda item: show_bytes(item["ram_bytes"]))),
        ("GPU", values(lambda item: ", ".join(item["gpus"]) or "none")),
        ("System", values(lambda item: item["platform"])),
        ("Python", values(lambda item: item["python"])),
        *((name, package(name)) for name in ("torch", "transformers", "numpy", "mlflow")),
        ("Determinism", values(lambda item: ", ".join(f"{k}={v}" for k, v in item.get("determinism", {}).items()))),
        ("Installed packages", values(lambda item: item.get("lock_hash"))),
    ]


def page_cache_statement(tags: Sequence[dict[str, str]]) -> str:
    """Return how timed runs read experts: through the page cache, a load is the memory's speed and not the disk's."""
    said = sorted({item.get(PAGE_CACHE_TAG, "") for item in tags} - {""})
    if not said:
        return "No run of this sweep says how experts were read; take no load time from it."
    return f"Page cache in timed runs: {' / '.join(said)}."
