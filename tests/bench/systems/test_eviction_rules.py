"""Promises of the eviction rules of comparison: who leaves first."""

from __future__ import annotations

import pytest
from slot_tables import filled, use

from emoe_core.errors import OptionError
from workbench.systems.eviction_rules import RULES, least_stale, lfu
from workbench.systems.option_names import resolve_options


def test_lfu_evicts_the_least_often_used_and_ties_go_to_the_oldest() -> None:
    table = filled(lfu)
    use(table, 0)
    use(table, 2)
    assert table.allocate(0, 7)[1].expert == 1
    assert filled(lfu).allocate(0, 7)[1].expert == 0


def test_least_stale_keeps_what_this_pass_used() -> None:
    table = filled(least_stale)
    table.forward += 1
    use(table, 0)
    assert table.allocate(0, 7)[1].expert == 1
    streaming = filled(least_stale)
    assert streaming.allocate(0, 7)[1].expert == 2, "with nothing stale the newest goes"


@pytest.mark.parametrize("name", RULES)
def test_of_nobody_no_rule_chooses_anybody(name: str) -> None:
    assert RULES[name]([], 0) is None


def test_names_that_nobody_knows_are_refused_with_those_that_the_bench_knows() -> None:
    with pytest.raises(OptionError, match="choose one of decayed_demand, least_stale, lfu, lru, static"):
        resolve_options({"policy": "clock"})
    known = r"choose one of activation_map, .*none, random, recent, transformer, transition"
    with pytest.raises(OptionError, match=known):
        resolve_options({"predictor": "oracle"})
