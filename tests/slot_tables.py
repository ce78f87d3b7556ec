"""Residency tables as tests of eviction begin with them."""

from __future__ import annotations

from emoe_core.loader.eviction import make_table
from emoe_core.loader.slots import Policy, SlotTable


def filled(policy: Policy, experts: int = 3) -> SlotTable:
    """Return a full layer of experts 0, 1, ..., used once in this order."""
    table = make_table([experts], 1, policy, 7)
    for expert in range(experts):
        admitted = table.allocate(0, expert)
        assert admitted is not None
        admitted[0].ready, admitted[0].pins = True, 0
        table.touch(admitted[0])
    return table


def use(table: SlotTable, expert: int) -> None:
    """Use a resident expert of the layer once."""
    entry = table.get(0, expert)
    assert entry is not None
    table.touch(entry)
