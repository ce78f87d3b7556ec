"""A memory budget for experts, what it buys in slots, and every other term of a model's memory.

Terms. A *slot* holds one expert's record, padding included. *Slots per layer* is a partition: a layer's experts only
use that layer's slots. The *staging* slot, as large as the largest record and shared by all layers, takes the record
that is in flight; it counts in the budget. *Share* is slots / experts, beside which k/E (experts a token uses / experts
a layer has) says how far below one token's need a budget goes.

The smallest exact budget is one slot a layer and the staging slot. Below top-k slots a layer, every token streams
experts through its slots: exact, and slow. When all experts fit, nothing is in flight and there is no staging slot.

Only routed experts are budgeted. `memory_breakdown` states every term of a model's memory beside the slots.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from emoe_core.checkpoint.index import CheckpointIndex, MoeLayer
from emoe_core.errors import BudgetError, OptionError
from emoe_core.footprint import MemoryBreakdown, memory_breakdown

__all__ = ["Budget", "MemoryBreakdown", "SlotPlan", "amount_bytes", "memory_breakdown", "plan_layers", "plan_slots"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_NUMBER = r"(\d+(?:[_,]\d{3})*(?:\.\d+)?|\.\d+)"
_PERCENT = re.compile(_NUMBER + r"\s*%")
_SLOTS = re.compile(r"(\d+)\s*slots?(?:\s*(?:per|a|/)\s*layer)?", re.IGNORECASE)
_BYTES = re.compile(_NUMBER + r"\s*([KMGT]?I?B?)", re.IGNORECASE)
_EXAMPLES = 'write bytes ("300MB", "1.5GiB"), a share of expert bytes ("40%"), or slots per layer ("3 slots")'


@dataclass(frozen=True)
class Budget:
    """How much memory experts may use.

    Attributes
    ----------
    kind : {"bytes", "share", "slots"}
    value : float
        Bytes; or a fraction of all experts' bytes in (0, 1]; or slots per layer.
    text : str
        As the user wrote it.
    """

    kind: Literal["bytes", "share", "slots"]
    value: float
    text: str

    def __post_init__(self) -> None:
        if self.kind not in ("bytes", "share", "slots"):
            raise BudgetError(f"unknown kind of budget {self.kind!r}: {_EXAMPLES}")
        if not math.isfinite(self.value) or self.value <= 0:
            raise BudgetError(f"the budget {self.text!r} is not above zero: {_EXAMPLES}")
        if self.kind == "share" and self.value > 1:
            raise BudgetError(f"the budget {self.text!r} is more than all experts: a share is at most 100%")

    @staticmethod
    def parse(value: str | int | float | Budget) -> Budget:
        """Understand a budget: an int is bytes, a float is a share in (0, 1], a text names its unit.

        Decimal units (kB, MB, GB) are powers of 1000, binary ones (KiB, MiB, GiB) of 1024.

        Raises
        ------
        BudgetError
            When it cannot be understood.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise BudgetError(f"cannot understand the budget {value!r}: {_EXAMPLES}")
        if isinstance(value, int):
            return Budget("bytes", value, f"{value} bytes")
        if isinstance(value, float):
            return Budget("share", value, f"{value:.4g} of expert bytes")
        text = value.strip()
        if match := _PERCENT.fullmatch(text):
            return Budget("share", _number(match[1]) / 100, text)
        if match := _SLOTS.fullmatch(text):
            return Budget("slots", int(match[1]), text)
        match = _BYTES.fullmatch(text)
        if match and not match[2] and 0 < _number(match[1]) <= 100:
            # Nobody means 40 bytes.
            share = _number(match[1]) * (100 if _number(match[1]) <= 1 else 1)
            raise BudgetError(f'the budget "{text}" has no unit: did you mean "{share:g}%"? Else {_EXAMPLES}')
        if match and match[2].upper() in _UNITS:
            return Budget("bytes", math.floor(_number(match[1]) * _UNITS[match[2].upper()]), text)
        raise BudgetError(f"cannot understand the budget {value!r}: {_EXAMPLES}")


def amount_bytes(text: str, forms: str = '"900MB" or "1.5GiB"') -> int:
    """Return an amount of memory that is not a budget, such as a limit, in bytes.

    Parameters
    ----------
    text : str
        Bytes as `Budget.parse` understands them.
    forms : str
        What may be written, for the message.

    Raises
    ------
    OptionError
        When it is no amount of bytes.
    """
    try:
        found = Budget.parse(text)
    except BudgetError:
        found = None
    if found is None or found.kind != "bytes":
        raise OptionError(f"cannot understand the amount of memory {text!r}: write {forms}")
    return int(found.value)


@dataclass(frozen=True)
class SlotPlan:
    """How many slots each MoE layer gets.

    Attributes
    ----------
    budget : Budget
    budget_bytes : int
        What the budget comes to in bytes for this checkpoint.
    slots_per_layer : tuple of int
    staging_slots : int
        1, or 0 when every expert is resident.
    record_bytes : tuple of int
        Size of a slot of each layer.
    num_experts : tuple of int
        Experts of each layer.
    top_k : int
    """

    budget: Budget
    budget_bytes: int
    slots_per_layer: tuple[int, ...]
    staging_slots: int
    record_bytes: tuple[int, ...]
    num_experts: tuple[int, ...]
    top_k: int

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging slot, 0 when there is none."""
        return self.staging_slots * max(self.record_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots, the staging slot included; never above ``budget_bytes``."""
        slots = zip(self.slots_per_layer, self.record_bytes, strict=True)
        return sum(count * size for count, size in slots) + self.staging_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts, were they resident."""
        return sum(count * size for count, size in zip(self.num_experts, self.record_bytes, strict=True))

    @property
    def resident_share(self) -> float:
        """Share of experts that have a slot, in (0, 1]; the staging slot is not counted."""
        return sum(self.slots_per_layer) / sum(self.num_experts)

    @property
    def top_k_share(self) -> float:
        """k/E: the share of a layer's experts that one token uses."""
        return self.top_k * len(self.num_experts) / sum(self.num_experts)

    @property
    def all_resident(self) -> bool:
        return self.slots_per_layer == self.num_experts

    @property
    def streams(self) -> bool:
        """Whether some layer has fewer slots than one token's experts, so that every token loads experts."""
        pairs = zip(self.slots_per_layer, self.num_experts, strict=True)
        return any(slots < min(self.top_k, experts) for slots, experts in pairs)

    @property
    def warning(self) -> str | None:
        """What a user should know before running with this plan, or None."""
        if not self.streams:
            return None
        return (
            f"the budget {self.budget.text} gives {min(self.slots_per_layer)} slots in the smallest layer, below the "
            f"{self.top_k} experts a token uses: results stay exact at tolerance 0, but every token loads experts. "
            f"{_bytes_text(self._bytes_for_top_k())} would hold one token's experts."
        )

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as (term, value) rows for people."""
        low, high = min(self.slots_per_layer), max(self.slots_per_layer)
        return [
            ("budget", f"{self.budget.text} = {_bytes_text(self.budget_bytes)}"),
            ("slots per layer", str(low) if low == high else f"{low} to {high}"),
            ("staging slots", str(self.staging_slots)),
            ("slot memory", f"{_bytes_text(self.slot_bytes)} of {_bytes_text(self.expert_bytes)}"),
            ("experts resident", f"{self.resident_share:.1%} (one token uses k/E = {self.top_k_share:.1%})"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{term}: {value}" for term, value in self.rows())

    def _bytes_for_top_k(self) -> int:
        pairs = zip(self.num_experts, self.record_bytes, strict=True)
        return sum(min(self.top_k, experts) * size for experts, size in pairs) + max(self.record_bytes)


def plan_slots(index: CheckpointIndex, budget: Budget | str | int | float) -> SlotPlan:
    """Turn a budget into slots per layer: uniform, the remainder spread evenly over the layers' depth.

    A larger budget never takes a slot from any layer. Slots take any layer's record, so each counts as the largest one.

    Raises
    ------
    BudgetError
        When the budget cannot hold one slot a layer and the staging slot, with the shortfall named.
    """
    largest = max(layer.record_bytes for layer in index.layers)
    layers = tuple(replace(layer, record_bytes=largest) for layer in index.layers)
    return plan_layers(layers, index.top_k, Budget.parse(budget))


def plan_given(index: CheckpointIndex, slots_per_layer: Sequence[int], text: str) -> SlotPlan:
    """Return the plan that gives each layer a number of slots; ``text`` says for people where they come from."""
    record_bytes = max(layer.record_bytes for layer in index.layers)
    experts = tuple(layer.num_experts for layer in index.layers)
    slots = tuple(slots_per_layer)
    if len(slots) != len(experts) or not all(1 <= count <= most for count, most in zip(slots, experts, strict=True)):
        raise BudgetError(f"{list(slots)} slots do not fit {len(experts)} MoE layers: give each 1 up to its experts")
    staging = int(slots != experts)
    limit_bytes = (sum(slots) + staging) * record_bytes
    sizes = (record_bytes,) * len(experts)
    return SlotPlan(Budget("bytes", limit_bytes, text), limit_bytes, slots, staging, sizes, experts, index.top_k)


def plan_layers(layers: tuple[MoeLayer, ...], top_k: int, budget: Budget) -> SlotPlan:
    """As `plan_slots`, for layers that need no checkpoint."""
    sizes = tuple(layer.record_bytes for layer in layers)
    experts = tuple(layer.num_experts for layer in layers)
    total_bytes = sum(count * size for count, size in zip(experts, sizes, strict=True))
    minimum_bytes = min(sum(sizes) + max(sizes), total_bytes)
    if budget.kind == "slots":
        wanted = [min(int(budget.value), count) for count in experts]
        slots_bytes = sum(count * size for count, size in zip(wanted, sizes, strict=True))
        limit_bytes = slots_bytes if tuple(wanted) == experts else slots_bytes + max(sizes)
    elif budget.kind == "share":
        limit_bytes = math.floor(budget.value * total_bytes)
    else:
        limit_bytes = int(budget.value)
    if limit_bytes < minimum_bytes:
        minimum_percent = _percent_above(minimum_bytes, total_bytes)
        raise BudgetError(
            f"the budget {budget.text} is {limit_bytes:,} bytes; one slot in each of {len(layers)} MoE layers and one "
            f"in flight need {minimum_bytes:,}: {minimum_bytes - limit_bytes:,} bytes short. Pass at least "
            f'"{_round_number_above(minimum_bytes)}", "{minimum_percent:g}%" or "1 slot".'
        )
    if budget.kind == "slots":
        # Taken literally, even where the staging slot's bytes would make the last expert resident.
        slots, staging = tuple(wanted), int(tuple(wanted) != experts)
    elif limit_bytes >= total_bytes:
        slots, staging = experts, 0
    else:
        slots, staging = _spread(experts, sizes, limit_bytes - max(sizes)), 1
    return SlotPlan(budget, limit_bytes, slots, staging, sizes, experts, top_k)


def _spread(experts: tuple[int, ...], sizes: tuple[int, ...], usable_bytes: int) -> tuple[int, ...]:
    """Add slots in one fixed order until the next does not fit; a longer prefix never has fewer in any layer."""
    order = _even_order(len(experts))
    slots = [0] * len(experts)
    left_bytes = usable_bytes
    for layer in (layer for turn in range(max(experts)) for layer in order if turn < experts[layer]):
        if sizes[layer] > left_bytes:
            break
        slots[layer] += 1
        left_bytes -= sizes[layer]
    return tuple(slots)


def _even_order(count: int) -> list[int]:
    """Return 0..count-1 so that every prefix is spread over the range (bit-reversed counting)."""
    bits = count.bit_length()
    reversed_bits = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return [number for number in reversed_bits if number < count]


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _percent_above(count: int, total_bytes: int) -> float:
    """Return a share in tenths of a percent that comes to at least this many bytes, as `plan_layers` rounds it."""
    tenths = math.ceil(1000 * count / total_bytes)
    # Where a tenth is met exactly, the float of the share may come to a byte less.
    return (tenths if math.floor(tenths / 10 / 100 * total_bytes) >= count else tenths + 1) / 10


def _round_number_above(count: int) -> str:
    """Return a budget a person would type that is at least this many bytes."""
    unit, size = ("MB", 10**6) if count >= 10 * 10**6 else ("kB", 10**3)
    return f"{math.ceil(count / size)}{unit}"


def _bytes_text(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"
