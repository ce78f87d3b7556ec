"""Which items are kept and which split each goes to: by hashes of content and seed, never by order.

The same item lands in the same split on every machine and in every order of reading. Splits are disjoint by group
(see `records`), not only by item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from workbench.workloads.records import Record

SPLITS = ("profile", "train", "test")
SEED = 20250310
MAX_ITEMS_PER_SPLIT = 400


def stable_hash(*parts: str | int) -> int:
    """Return a 64-bit hash of the parts that is the same in every process (unlike ``hash``)."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode("utf-8"))
    return int.from_bytes(digest.digest()[:8], "big")


def split_of(task: str, group: str, seed: int = SEED) -> str:
    """Return the split that a group of items belongs to."""
    return SPLITS[stable_hash(seed, task, "split", group) % len(SPLITS)]


def item_id(task: str, prompt: str, reference: str) -> str:
    """Return an item's identifier: the task and a hash of its content."""
    return f"{task}-{stable_hash(task, prompt, reference):016x}"


def choose(
    task: str,
    items: Iterable[tuple[Record, str]],
    seed: int = SEED,
    max_items: int = MAX_ITEMS_PER_SPLIT,
) -> dict[str, list[tuple[Record, str]]]:
    """Split (record, prompt) pairs and keep at most ``max_items`` per split and one per unit.

    Units are ranked before items, so that a paragraph with many questions is no likelier than one with few.

    Returns
    -------
    dict of str to list
        Split name to pairs, ordered by hash.
    """

    def rank(item: tuple[Record, str]) -> tuple[int, int]:
        record, prompt = item
        return stable_hash(seed, task, "unit", record.unit), stable_hash(seed, task, prompt, record.reference)

    ranked = sorted(items, key=rank)
    chosen: dict[str, list[tuple[Record, str]]] = {name: [] for name in SPLITS}
    seen: set[tuple[str, str]] = set()
    for record, prompt in ranked:
        target = chosen[split_of(task, record.group, seed)]
        keys = {("unit", record.unit), ("prompt", prompt)}
        if len(target) < max_items and not keys & seen:
            seen |= keys
            target.append((record, prompt))
    return chosen
