"""Promises of the residency table: never over budget, never a shared slot, never a pinned expert evicted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from slot_tables import filled, use

from emoe_core.errors import OptionError
from emoe_core.loader.eviction import POLICY_NAMES, lru, make_table, require_policy
from emoe_core.loader.slots import Entry, Policy, SlotTable
from workbench.systems.eviction_rules import RULES, static

POLICIES = [*POLICY_NAMES, *RULES.values()]


class AnyUseOfTheTable(RuleBasedStateMachine):
    """Admissions, arrivals, uses, releases and failures in any order."""

    @initialize(
        capacity=st.lists(st.integers(1, 3), min_size=1, max_size=3),
        staging=st.integers(0, 1),
        policy=st.sampled_from(POLICIES),
    )
    def make(self, capacity: list[int], staging: int, policy: str | Policy) -> None:
        self.table = make_table(capacity, staging, policy, 7)

    def pick(self, data: st.DataObject, wanted) -> Entry | None:
        entries = [entry for entry in self.table.entries() if wanted(entry)]
        return data.draw(st.sampled_from(entries)) if entries else None

    @rule(data=st.data(), may_use_staging=st.booleans())
    def admit(self, data: st.DataObject, may_use_staging: bool) -> None:
        layer = data.draw(st.integers(0, len(self.table.capacity) - 1))
        expert = data.draw(st.integers(0, 6))
        if self.table.get(layer, expert) is not None:
            return
        before = {(entry.layer, entry.expert): (entry.pins, entry.ready) for entry in self.table.entries()}
        full = self.table.room(layer) == 0
        admitted = self.table.allocate(layer, expert, may_use_staging=may_use_staging)
        after = {(entry.layer, entry.expert) for entry in self.table.entries()}
        gone = set(before) - after
        assert all(before[key] == (0, True) for key in gone), "a pinned or loading expert was evicted"
        if admitted is None:
            assert full and not gone
            return
        entry, evicted = admitted
        assert gone == (set() if evicted is None else {(layer, evicted.expert)})
        assert entry.pins == 1 and not entry.ready
        if not may_use_staging:
            assert len(self.table.resident(layer)) <= max(self.table.capacity[layer], len(before))

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        layer = data.draw(st.integers(0, len(self.table.capacity) - 1))
        before = self.table.resident(layer)
        self.table.begin(layer, data.draw(st.lists(st.integers(0, 5), min_size=7, max_size=7)))
        assert self.table.resident(layer) == before

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        if (entry := self.pick(data, lambda entry: not entry.ready)) is not None:
            entry.ready = True

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if (entry := self.pick(data, lambda entry: not entry.ready)) is not None:
            self.table.discard(entry)
            assert self.table.get(entry.layer, entry.expert) is None

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        if (entry := self.pick(data, lambda entry: entry.ready)) is not None:
            self.table.touch(entry)
            assert entry.served

    @rule(data=st.data(), pins=st.sampled_from([-1, 1]))
    def pin(self, data: st.DataObject, pins: int) -> None:
        if (entry := self.pick(data, lambda entry: entry.pins + pins >= 0)) is not None:
            entry.pins += pins

    @precondition(lambda self: hasattr(self, "table"))
    @invariant()
    def never_over_budget_and_never_two_in_a_slot(self) -> None:
        self.table.check()
        used = [entry.slot for entry in self.table.entries()]
        assert len(used) == len(set(used)) <= sum(self.table.capacity) + self.table.staging
        over = sum(max(0, len(self.table.resident(layer)) - size) for layer, size in enumerate(self.table.capacity))
        assert over <= self.table.staging
        assert all(0 <= slot < self.table.slots for slot in used)


AnyUseOfTheTable.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAnyUseOfTheTable = AnyUseOfTheTable.TestCase


def test_lru_evicts_the_least_recently_used() -> None:
    table = filled(lru)
    use(table, 0)
    assert table.allocate(0, 7)[1].expert == 1


def test_static_never_evicts_a_planned_resident_on_demand() -> None:
    table = filled(static)
    for expert in (5, 6, 7):
        admitted = table.allocate(0, expert)
        assert admitted is not None
        entry, evicted = admitted
        assert evicted is None or evicted.expert >= 5
        entry.ready, entry.pins = True, 0
        assert {0, 1, 2} <= table.resident(0)
    table.evict(table.beyond_capacity(0))
    assert table.resident(0) == {0, 1, 2}
    assert table.beyond_capacity(0) is None


@given(st.sampled_from(POLICIES))
def test_a_layer_pinned_full_without_spare_admits_nobody(policy: str | Policy) -> None:
    table = make_table([2], 0, policy, 7)
    for expert in range(2):
        table.allocate(0, expert)[0].ready = True
    assert table.allocate(0, 5) is None
    assert table.resident(0) == {0, 1}


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match="lru, decayed_demand"):
        require_policy("clock")


def test_table_refuses_to_evict_pinned_and_loading_experts() -> None:
    table = SlotTable([1], 0, lru)
    admitted = table.allocate(0, 3)
    assert admitted is not None
    entry = admitted[0]
    with pytest.raises(AssertionError, match="still arriving"):
        table.evict(entry)
    entry.ready = True
    with pytest.raises(AssertionError, match="pinned"):
        table.evict(entry)
    assert table.allocate(0, 4) is None, "a full layer of pinned experts has no room"
    entry.pins = 0
    assert table.allocate(0, 4) is not None


def arrive(table: SlotTable, expert: int) -> Entry:
    """Admit an expert to layer 0 whose bytes are there and whom nobody uses."""
    admitted = table.allocate(0, expert)
    assert admitted is not None
    admitted[0].ready, admitted[0].pins = True, 0
    return admitted[0]


def overfull(policy: Policy) -> SlotTable:
    """Return a table of two slots whose layer holds three experts, the last one borrowed; none is pinned."""
    table = SlotTable([2], 1, policy)
    first, second = arrive(table, 0), arrive(table, 1)
    first.pins = second.pins = 1
    assert arrive(table, 2).staged
    first.pins = second.pins = 0
    return table


def test_the_clock_ticks_once_for_each_arrival_and_use() -> None:
    table = SlotTable([2], 0, lru)
    assert table.clock == 0
    table.forward = 5
    entry = arrive(table, 3)
    assert (table.clock, entry.arrived, entry.touched, entry.forward, entry.uses) == (1, 1, 1, 5, 0)
    table.forward = 6
    table.touch(entry)
    table.touch(entry)
    assert (table.clock, entry.arrived, entry.touched, entry.forward, entry.uses) == (3, 1, 3, 6, 2)


def test_slots_are_handed_out_from_the_first_and_come_back() -> None:
    table = SlotTable([2], 1, lru)
    assert [arrive(table, expert).slot for expert in (4, 5)] == [0, 1]
    table.evict(table.get(0, 4))
    assert arrive(table, 6).slot == 0


def test_a_policy_that_evicts_decides_also_where_a_slot_is_borrowed() -> None:
    assert overfull(lru).victim(0).expert == 0


def test_static_gives_back_only_what_was_borrowed_and_only_while_the_layer_is_overfull() -> None:
    table = overfull(static)
    assert table.victim(0).expert == 2
    table.get(0, 2).pins = 1
    assert table.victim(0) is None, "the borrowed one is in use"
    table.get(0, 2).pins = 0
    table.evict(table.get(0, 0))
    assert table.victim(0) is None, "two experts in two slots: nobody has to leave"


def test_a_layer_within_its_capacity_owes_nothing() -> None:
    assert filled(lru).beyond_capacity(0) is None
    assert overfull(lru).beyond_capacity(0).expert == 0


def test_a_table_that_contradicts_itself_says_how() -> None:
    twice, lost, crowded = overfull(lru), overfull(lru), overfull(lru)
    twice.get(0, 1).slot = twice.get(0, 0).slot
    lost._free.append(7)
    crowded.staging = 0
    crowded.capacity = (2, 1)
    for table, contradiction in ((twice, "two experts in one slot"), (lost, "a slot was lost")):
        with pytest.raises(AssertionError, match=f"^{contradiction}"):
            table.check()
    with pytest.raises(AssertionError, match=r"^more experts than slots"):
        crowded.check()
