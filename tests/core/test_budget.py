"""A plan never exceeds its budget, grows with it, and refusals name what is missing; every term of memory is stated."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from emoe_core.budget import Budget, amount_bytes, memory_breakdown, plan_given, plan_layers, plan_slots
from emoe_core.checkpoint.index import MoeLayer, open_checkpoint
from emoe_core.device import Device
from emoe_core.errors import BudgetError, OptionError
from workbench.models.reference.tiny import FAMILIES, tiny_moe

PAGE = 4096


def layers_of(*shapes: tuple[int, int]) -> tuple[MoeLayer, ...]:
    """Make layers from (experts, record pages) pairs."""
    return tuple(MoeLayer(f"layer.{n}", n, experts, (), pages * PAGE) for n, (experts, pages) in enumerate(shapes))


layer_shapes = st.lists(st.tuples(st.integers(1, 16), st.integers(1, 8)), min_size=1, max_size=12)
even_shapes = st.tuples(st.integers(1, 40), st.integers(2, 16)).map(lambda pair: [(pair[1], 3)] * pair[0])


def total_bytes(layers: tuple[MoeLayer, ...]) -> int:
    return sum(layer.num_experts * layer.record_bytes for layer in layers)


def minimum_bytes(layers: tuple[MoeLayer, ...]) -> int:
    sizes = [layer.record_bytes for layer in layers]
    return min(sum(sizes) + max(sizes), total_bytes(layers))


@pytest.mark.parametrize(
    ("written", "kind", "value"),
    [
        ("300MB", "bytes", 300_000_000),
        (" 1.5 GiB ", "bytes", 3 * 2**29),
        ("512kb", "bytes", 512_000),
        ("2048", "bytes", 2048),
        ("1,000,000 B", "bytes", 1_000_000),
        ("1_000_000", "bytes", 1_000_000),
        ("101", "bytes", 101),
        (4096, "bytes", 4096),
        ("40%", "share", 0.4),
        ("12.5 %", "share", 0.125),
        (0.25, "share", 0.25),
        (1.0, "share", 1.0),
        ("100%", "share", 1.0),
        ("3 slots", "slots", 3),
        ("1 slot", "slots", 1),
        ("4 slots per layer", "slots", 4),
    ],
)
def test_budgets_are_understood(written: str | int | float, kind: str, value: float) -> None:
    parsed = Budget.parse(written)
    assert (parsed.kind, parsed.value) == (kind, pytest.approx(value))
    assert Budget.parse(parsed) is parsed


@pytest.mark.parametrize(
    "written",
    [
        *("", "much", "-3MB", "3 MBit", "0", "0%", "101%", "1.5 slots", "0 slots", "40 %%", "NaN%"),
        *(0, -1, 0.0, 1.01, math.nan, math.inf, True, None, []),
    ],
)
def test_other_budgets_are_refused_with_examples(written: object) -> None:
    with pytest.raises(BudgetError, match=r"300MB|above zero|at most 100%"):
        Budget.parse(written)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (4096, "4096 bytes"),
        (0.25, "0.25 of expert bytes"),
        (" 40 % ", "40 %"),
        ("3 slots", "3 slots"),
        (" 1.5 GiB ", "1.5 GiB"),
    ],
)
def test_a_budget_remembers_what_was_written(written: str | int | float, text: str) -> None:
    assert Budget.parse(written).text == text


def test_a_kind_that_does_not_exist_is_named() -> None:
    with pytest.raises(BudgetError, match="unknown kind of budget 'pages': write bytes"):
        Budget("pages", 1, "1 page")  # type: ignore[arg-type]


def test_an_amount_of_memory_is_bytes_and_nothing_else() -> None:
    assert (amount_bytes("2.2GB"), amount_bytes("1.5 GiB"), amount_bytes("4096")) == (2_200_000_000, 3 << 29, 4096)
    for written in ("40%", "3 slots", "40", "much"):
        with pytest.raises(OptionError, match=f"understand the amount of memory '{written}': write \"900MB\""):
            amount_bytes(written)


@pytest.mark.parametrize("written", ["0", 0, "0%", 0.0])
def test_nothing_is_no_budget(written: str | int | float) -> None:
    with pytest.raises(BudgetError, match="is not above zero"):
        Budget.parse(written)


@pytest.mark.parametrize(
    ("written", "meant"), [("40", "40%"), ("0.4", "40%"), ("100", "100%"), ("1", "100%"), ("2", "2%")]
)
def test_a_number_without_a_unit_is_asked_about(written: str, meant: str) -> None:
    with pytest.raises(BudgetError, match=f'did you mean "{meant}"'):
        Budget.parse(written)


@given(layer_shapes, st.integers(1, 4 * 16 * 12 * 8 * PAGE))
def test_a_plan_never_exceeds_its_budget_and_every_layer_has_a_slot(shapes: list, given_bytes: int) -> None:
    layers = layers_of(*shapes)
    if given_bytes < minimum_bytes(layers):
        with pytest.raises(BudgetError):
            plan_layers(layers, 2, Budget.parse(given_bytes))
        return
    plan = plan_layers(layers, 2, Budget.parse(given_bytes))
    assert plan.slot_bytes <= plan.budget_bytes == given_bytes
    slots = list(zip(plan.slots_per_layer, layers, strict=True))
    assert plan.slot_bytes == sum(count * layer.record_bytes for count, layer in slots) + plan.staging_bytes
    assert all(1 <= count <= layer.num_experts for count, layer in slots)
    assert plan.staging_slots == (0 if plan.all_resident else 1)
    assert plan.staging_bytes == plan.staging_slots * max(layer.record_bytes for layer in layers)
    assert 0 < plan.resident_share <= 1


@given(layer_shapes, st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_larger_budget_never_takes_a_slot_from_a_layer(shapes: list, first: int, second: int) -> None:
    layers = layers_of(*shapes)
    small, large = (minimum_bytes(layers) + extra for extra in sorted((first, second)))
    before = plan_layers(layers, 2, Budget.parse(small)).slots_per_layer
    after = plan_layers(layers, 2, Budget.parse(large)).slots_per_layer
    assert all(less <= more for less, more in zip(before, after, strict=True))


def test_a_layer_that_is_full_takes_no_turn_from_the_others() -> None:
    layers = layers_of((8, 1), (8, 1), (1, 1))
    # Twelve records less the staging slot.
    assert plan_layers(layers, 2, Budget.parse(12 * PAGE)).slots_per_layer == (5, 5, 1)


@given(even_shapes, st.floats(0.01, 1.0))
def test_equal_layers_get_equal_slots_up_to_one_and_no_slot_is_wasted(shapes: list, share: float) -> None:
    layers = layers_of(*shapes)
    budget = Budget.parse(share)
    if math.floor(share * total_bytes(layers)) < minimum_bytes(layers):
        return
    plan = plan_layers(layers, 2, budget)
    assert max(plan.slots_per_layer) - min(plan.slots_per_layer) <= 1
    if not plan.all_resident and sum(plan.slots_per_layer) < sum(plan.num_experts):
        assert plan.budget_bytes - plan.slot_bytes < layers[0].record_bytes


@given(layer_shapes)
def test_the_minimum_is_enough_and_one_byte_less_is_refused_by_its_shortfall(shapes: list) -> None:
    layers = layers_of(*shapes)
    least = minimum_bytes(layers)
    plan = plan_layers(layers, 2, Budget.parse(least))
    assert plan.slot_bytes == least
    with pytest.raises(BudgetError, match=re.escape("1 bytes short")):
        plan_layers(layers, 2, Budget.parse(least - 1))


# Of its 375 pages 42 are needed, exactly 11.2%: as a float that is a byte less.
@example([(2, 6), (4, 1), (9, 5), (9, 6), (13, 2), (13, 6), (14, 2), (16, 1), (16, 1), (16, 6)])
@given(layer_shapes)
def test_every_budget_that_a_refusal_suggests_is_accepted(shapes: list) -> None:
    layers = layers_of(*shapes)
    with pytest.raises(BudgetError) as refusal:
        plan_layers(layers, 2, Budget.parse(1))
    suggestions = re.findall(r'"([^"]+)"', str(refusal.value))
    assert len(suggestions) == 3
    for suggestion in suggestions:
        plan_layers(layers, 2, Budget.parse(suggestion))


@pytest.mark.parametrize(
    ("records", "size", "suggested"),
    [
        # The least of two layers is three records, of one layer two.
        ((8, 8), 3_333_333, '"10000kB", "18.8%" or "1 slot"'),
        ((8,), 5_000_000, '"10MB", "25%" or "1 slot"'),
        ((8,), 40_960, '"82kB", "25%" or "1 slot"'),
    ],
)
def test_a_refusal_says_what_is_short_and_what_would_do(records: tuple[int, ...], size: int, suggested: str) -> None:
    layers = tuple(MoeLayer(f"layer.{n}", n, experts, (), size) for n, experts in enumerate(records))
    least = (len(records) + 1) * size
    with pytest.raises(BudgetError) as refusal:
        plan_layers(layers, 2, Budget.parse(1000))
    assert str(refusal.value) == (
        f"the budget 1000 bytes is 1,000 bytes; one slot in each of {len(records)} MoE layers and one in flight need "
        f"{least:,}: {least - 1000:,} bytes short. Pass at least {suggested}."
    )


def test_a_share_that_is_met_exactly_is_suggested_a_tenth_above() -> None:
    shapes = [(2, 6), (4, 1), (9, 5), (9, 6), (13, 2), (13, 6), (14, 2), (16, 1), (16, 1), (16, 6)]
    with pytest.raises(BudgetError, match=re.escape('"11.3%"')):
        plan_layers(layers_of(*shapes), 2, Budget.parse(1))


@given(layer_shapes, st.integers(1, 20))
def test_slots_per_layer_are_taken_literally_and_capped_at_the_experts(shapes: list, count: int) -> None:
    layers = layers_of(*shapes)
    plan = plan_layers(layers, 2, Budget.parse(f"{count} slots"))
    assert plan.slots_per_layer == tuple(min(count, layer.num_experts) for layer in layers)
    assert plan.slot_bytes == plan.budget_bytes


@given(layer_shapes)
def test_one_hundred_percent_keeps_every_expert_without_a_spare(shapes: list) -> None:
    layers = layers_of(*shapes)
    for written in ("100%", 1.0, total_bytes(layers), 10 * total_bytes(layers)):
        plan = plan_layers(layers, 2, Budget.parse(written))
        assert plan.all_resident
        assert plan.staging_slots == 0
        assert plan.slot_bytes == total_bytes(layers)


def test_the_remainder_is_spread_over_the_depth() -> None:
    layers = layers_of(*[(8, 1)] * 30)
    plan = plan_layers(layers, 2, Budget.parse("60%"))
    # 144 records less the staging slot: 4 a layer and 23 more.
    assert sum(plan.slots_per_layer) == 143
    quarters = [sum(plan.slots_per_layer[start : start + 10]) for start in (0, 10, 20)]
    assert max(quarters) - min(quarters) <= 2


def test_fewer_slots_than_one_token_needs_is_a_warning() -> None:
    layers = layers_of((8, 1), (8, 1))
    tight = plan_layers(layers, 4, Budget.parse("3 slots"))
    assert tight.streams
    assert tight.warning is not None
    assert "every token loads experts" in tight.warning
    roomy = plan_layers(layers, 4, Budget.parse("4 slots"))
    assert not roomy.streams
    assert roomy.warning is None
    assert roomy.top_k_share == 0.5
    assert "k/E = 50.0%" in str(roomy)


def test_a_plan_tells_its_terms() -> None:
    layers = tuple(MoeLayer(f"layer.{n}", n, 8, (), 1_500_000) for n in range(2))
    plan = plan_layers(layers, 2, Budget.parse("50%"))
    assert str(plan).splitlines() == [
        "budget: 50% = 12 MB",
        "slots per layer: 3 to 4",
        "staging slots: 1",
        "slot memory: 12 MB of 24 MB",
        "experts resident: 43.8% (one token uses k/E = 25.0%)",
    ]
    assert dict(plan_layers(layers, 2, Budget.parse("3 slots")).rows())["slots per layer"] == "3"
    tight = plan_layers(layers, 4, Budget.parse("2 slots"))
    # Four experts in each of two layers, and the one in flight.
    assert tight.warning == (
        "the budget 2 slots gives 2 slots in the smallest layer, below the 4 experts a token uses: results stay exact "
        "at tolerance 0, but every token loads experts. 13.5 MB would hold one token's experts."
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (999, "999 B"),
        (1000, "1 kB"),
        (999_000, "999 kB"),
        (1_000_000, "1 MB"),
        (1_000_000_000, "1 GB"),
        (1_500_000_000, "1.5 GB"),
    ],
)
def test_bytes_are_told_in_the_largest_unit_that_fits(size: int, text: str) -> None:
    plan = plan_layers((MoeLayer("layer", 0, 1, (), size),), 1, Budget.parse("100%"))
    assert dict(plan.rows())["budget"] == f"100% = {text}"


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 7), (2, 50)])
def test_the_stated_cache_is_what_a_forward_pass_keeps(checkpoint: Path, batch: int, tokens: int) -> None:
    index = open_checkpoint(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        cache = model(torch.zeros(batch, tokens, dtype=torch.long), use_cache=True).past_key_values
    kept_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory_breakdown(index, plan_slots(index, "50%"), tokens, batch).kv_bytes == kept_bytes


def test_the_terms_add_up_and_are_printed(checkpoint: Path) -> None:
    index = open_checkpoint(checkpoint)
    plan = plan_slots(index, "50%")
    terms = memory_breakdown(index, plan, 100, logit_tokens=100)
    assert terms.dense_bytes == index.dense_bytes_total
    assert terms.slot_bytes == plan.slot_bytes
    assert terms.logits_bytes == 100 * index.config.vocab_size * 8
    assert terms.total_bytes == sum(value for name, value in terms.to_dict().items() if name != "total_bytes")
    assert f"{terms.total_bytes / 1e6:,.1f} MB" in str(terms)
    longer = memory_breakdown(index, plan, 200)
    assert longer.workspace_bytes > terms.workspace_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_terms_are_those_of_the_device(checkpoint: Path, dtype: str) -> None:
    class OtherDevice(Device):
        kind = "cuda"

        def library_bytes(self) -> int:
            return 1000

    index = open_checkpoint(checkpoint, dtype)
    plan = plan_slots(index, "50%")
    on_cpu, there = memory_breakdown(index, plan, 1), memory_breakdown(index, plan, 1, device=OtherDevice())
    assert (on_cpu.library_bytes, there.library_bytes) == (0, 1000)
    assert there.total_bytes == sum(value for name, value in there.to_dict().items() if name != "total_bytes")
    assert ("libraries (now)", "0.0 MB") in there.rows() and len(on_cpu.rows()) == len(there.rows()) - 1
    # The CPU's math library copies a 16-bit head, larger than all else of one token's pass; other devices' do not.
    assert (there.workspace_bytes < on_cpu.workspace_bytes) == (dtype == "bfloat16")


def test_sizes_below_one_are_refused(checkpoint: Path) -> None:
    index = open_checkpoint(checkpoint)
    with pytest.raises(OptionError, match="max_tokens"):
        memory_breakdown(index, plan_slots(index, "50%"), 0)


def test_every_slot_is_as_large_as_the_largest_record(checkpoint: Path) -> None:
    index = open_checkpoint(checkpoint)
    first = replace(index.layers[0], record_bytes=3 * index.layers[0].record_bytes)
    uneven = replace(index, layers=(first, *index.layers[1:]))
    plan = plan_slots(uneven, "60%")
    assert plan.record_bytes == (first.record_bytes,) * len(index.layers)
    assert plan.top_k == index.top_k
    given_plan = plan_given(uneven, [2] * len(index.layers), "a target")
    assert given_plan.record_bytes == plan.record_bytes
    assert given_plan.slot_bytes == given_plan.budget_bytes == (2 * len(index.layers) + 1) * first.record_bytes


def test_given_slots_are_taken_as_they_are(checkpoint: Path) -> None:
    index = open_checkpoint(checkpoint)
    experts = [layer.num_experts for layer in index.layers]
    mixed = [1, *experts[1:]]
    plan = plan_given(index, mixed, "a target")
    assert (plan.slots_per_layer, plan.staging_slots, plan.top_k) == (tuple(mixed), 1, index.top_k)
    assert (plan.budget.kind, plan.budget.text) == ("bytes", "a target")
    assert plan.num_experts == tuple(experts)
    everything = plan_given(index, experts, "all")
    assert everything.all_resident
    assert everything.staging_slots == 0
    assert everything.slot_bytes == everything.budget_bytes == everything.expert_bytes
    for wrong in ([1], [0, *experts[1:]], [experts[0] + 1, *experts[1:]]):
        with pytest.raises(BudgetError, match=re.escape(f"{wrong} slots do not fit {len(experts)} MoE layers: give")):
            plan_given(index, wrong, "a target")
