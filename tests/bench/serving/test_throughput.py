"""Throughput at equal memory: the same work for every system, and ratios of what was served in the same round."""

from __future__ import annotations

import pandas as pd
import pytest

from emoe_core.errors import OptionError
from workbench.models.reference.tiny import tiny_moe
from workbench.serving.checks.throughput import (
    ON_DEMAND,
    RESIDENT,
    SYSTEMS,
    ThroughputConfig,
    measure_throughput,
    summary,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    model = tiny_moe(tmp_path_factory.mktemp("throughput") / "model", "mixtral", seed=3)
    config = ThroughputConfig(
        str(model), "50%", n_requests=3, max_batch=2, input_tokens=8, output_tokens=4, repeats=2, source="fixture"
    )
    return measure_throughput(config)


def test_every_system_puts_out_the_same_tokens_in_every_repeat(served: pd.DataFrame) -> None:
    assert list(served["system"]) == [*SYSTEMS] * 2 and set(served["tokens"]) == {12}
    assert (served["tokens_per_s"] > 0).all()


def test_memory_is_equal_but_for_the_bound_and_only_exact_systems_load_while_they_compute(served: pd.DataFrame) -> None:
    mine = served[served["repeat"] == 0].set_index("system")
    assert (
        len(set(mine["slot_bytes"].drop(RESIDENT))) == 1
        and mine.loc[RESIDENT, "slot_bytes"] > mine.loc["emoe", "slot_bytes"]
    )
    assert mine.loc[RESIDENT, "loads"] == 0 and mine.loc[RESIDENT, "hit_rate"] == 1
    assert mine.loc[ON_DEMAND, "loads"] > mine.loc["emoe", "loads"]


def test_ratios_are_within_a_repeat() -> None:
    table = pd.DataFrame(
        [
            {
                "system": name,
                "repeat": repeat,
                "tokens_per_s": speed,
                "hit_rate": 0.5,
                "stall_share": 0.1,
                "slot_bytes": 7.0,
            }
            for repeat, speeds in enumerate(((2.0, 1.0), (6.0, 2.0), (5.0, 2.0)))
            for name, speed in zip(("emoe", ON_DEMAND), speeds, strict=True)
        ]
    )
    found = summary(table).set_index("system")
    assert (found.loc["emoe", "ratio_low"], found.loc["emoe", "ratio"], found.loc["emoe", "ratio_high"]) == (2, 2.5, 3)
    assert found.loc[ON_DEMAND, "ratio"] == 1 and found.loc["emoe", "tokens_per_s"] == 5


@pytest.mark.parametrize(
    ("settings", "message"), [({"systems": ("magic",)}, "unknown systems magic"), ({"repeats": 0}, "at least 1")]
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ThroughputConfig(**settings)  # type: ignore[arg-type]
