from __future__ import annotations

import math

import pytest

from workbench.metrics.catalogue import metric_of
from workbench.metrics.show import column_texts, metric_table, show, show_seconds, words_of


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("peak_bytes", 1.18e9, "1.18 GB"),
        ("peak_bytes", 999, "999 B"),
        ("bytes_loaded", 4.4e9, "4.4 GB"),
        ("fresh_bytes_loaded", 4_910_284_800, "4.91 GB"),
        ("stock_bytes_loaded", 0, "0 B"),
        ("bytes_loaded_ratio", 1.5, "1.5"),
        ("tpot_s", 0.0421, "42.1 ms"),
        ("load_s", 12.34, "12.3 s"),
        ("load_s", 0.0, "0 s"),
        ("hit_rate", 0.4567, "45.7%"),
        ("loads", 1234.0, "1,234"),
        ("kl_nats", 0.012341, "0.01234 nats"),
        ("read_bytes_per_s", 6.5e8, "650 MB/s"),
        ("decode_tokens_per_s", 17.25, "17.25 tokens/s"),
        ("perplexity_ratio", None, "–"),
        ("perplexity_ratio", math.nan, "–"),
    ],
)
def test_a_value_is_shown_with_the_unit_of_its_name(name: str, value: float | None, text: str) -> None:
    assert show(name, value) == text


@pytest.mark.parametrize(("seconds", "text"), [(59.4, "59.4 s"), (90, "1 min 30 s"), (3700, "1 h 01 min")])
def test_long_durations_are_in_minutes_and_hours(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


def test_a_name_is_words_and_a_unit() -> None:
    assert (words_of("peak_bytes"), metric_of("peak_bytes").unit) == ("peak", "bytes")
    assert (words_of("top1_agreement"), metric_of("top1_agreement").unit) == ("top1 agreement", "%")
    assert (words_of("loads"), metric_of("loads").unit) == ("loads", "")


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("peak_bytes", [6.6e8, 1.18e9], ("GB", ["0.660", "1.180"])),
        ("tpot_s", [0.2, 0.06667], ("ms", ["200", "67"])),
        ("load_s", [1.5, 12.0], ("s", ["1.5", "12.0"])),
        ("hit_rate", [0.5, 0.4567], ("%", ["50.0", "45.7"])),
        ("perplexity_ratio", [1.0, 1.0213, None], ("", ["1.000", "1.021", "–"])),
        ("loads", [5.0, 1200.0], ("", ["5", "1,200"])),
        ("loads", [None, None], ("", ["–", "–"])),
        ("kl_nats", [math.inf, 1.0], ("nats", ["inf", "1"])),
    ],
)
def test_a_column_has_one_unit_and_one_number_of_decimals(
    name: str, values: list[float | None], expected: tuple[str, list[str]]
) -> None:
    assert column_texts(name, values) == expected


def test_a_metric_table_has_words_and_units_and_a_dash_for_what_is_missing() -> None:
    table = metric_table({"slot_bytes": 2e9, "hit_rate": 0.5}, ["slot_bytes", "hit_rate", "kl_nats"])
    assert table[""].to_dict() == {"slot bytes": "2 GB", "hit rate": "50.0%", "kl": "–"}


def test_a_value_that_does_not_exist_is_a_dash_in_a_column() -> None:
    assert column_texts("perplexity_ratio_low", [1.25, math.nan, None]) == ("", ["1.250", "–", "–"])
