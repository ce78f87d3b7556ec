"""Longest prompt and largest batch: the rule of the limit, what a trial's end means, and one search for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from emoe_core.errors import ExperimentError, OptionError
from workbench.machine.control_groups import Controller
from workbench.measure.launch import FAILED, KILLED, MEASURED, NO_MEMORY, TOO_SLOW, Launched
from workbench.measure.limit_trials import STOCK, SURVIVED, Configuration, Trial, Trials, trial_outcome
from workbench.measure.longest import MEGABYTE, SearchConfig, configurations, resolve_limit, search
from workbench.models.names import TINY, resolve_model
from workbench.paper.longest import beside_paper, limits_figure


class Computed:
    """Trials of a made-up machine: fixed bytes for the weights, and some for each token."""

    def __init__(self, fixed: dict[str, int], token_bytes: int = MEGABYTE) -> None:
        self.index = SimpleNamespace(expert_bytes_total=300 * MEGABYTE, dense_bytes_total=100 * MEGABYTE)
        self.fixed, self.token_bytes = fixed, token_bytes
        self.done: list[Trial] = []

    def run(
        self, configuration: Configuration, prompt_tokens: int, batch: int, limit_bytes: int, *, again: bool = False
    ) -> Trial:
        needed = self.fixed[configuration.name] + prompt_tokens * batch * self.token_bytes
        outcome = SURVIVED if needed <= limit_bytes else KILLED
        speed = 10.0 * batch if outcome == SURVIVED else None
        self.done.append(
            Trial(
                configuration.name,
                prompt_tokens,
                batch,
                limit_bytes,
                outcome,
                needed,
                0,
                1.0,
                decode_tokens_per_s=speed,
            )
        )
        return self.done[-1]


def test_the_rule_gives_stock_room_for_the_base_prompt_and_no_more() -> None:
    trials = Computed({STOCK: 400 * MEGABYTE})
    config = SearchConfig(base_tokens=100, step_bytes=16 * MEGABYTE)
    assert resolve_limit(trials, config) == 512 * MEGABYTE  # type: ignore[arg-type]
    more = replace(config, limit="stock + 200MB")
    assert resolve_limit(trials, more) == 712 * MEGABYTE  # type: ignore[arg-type]
    given = replace(config, limit="700MB")
    assert resolve_limit(trials, given) == 700 * MEGABYTE  # type: ignore[arg-type]


def test_a_search_finds_what_memory_allows_and_holds_it_against_stock() -> None:
    tried = configurations("40%", ["stock", "exact"])
    trials = Computed({STOCK: 400 * MEGABYTE, "emoe 40%, exact": 200 * MEGABYTE})
    config = SearchConfig(base_tokens=100, max_tokens=1000, batch_prompt_tokens=50, max_batch=5, resolution=0)
    found = search(trials, config, tried, 500 * MEGABYTE).set_index("configuration")  # type: ignore[arg-type]
    assert found["longest_tokens"].tolist() == [100, 300] and not found["tokens_capped"].any()
    assert found["largest_batch"].tolist() == [2, 5] and found["batch_capped"].tolist() == [False, True]
    assert found["tokens_ratio"].tolist() == [1.0, 3.0] and found["speed_ratio"].tolist() == [1.0, 2.5]


def test_a_configuration_that_never_fits_is_shown_as_such() -> None:
    trials = Computed({STOCK: 600 * MEGABYTE, "emoe 100%": 100 * MEGABYTE})
    config = SearchConfig(base_tokens=64, max_tokens=128, max_batch=2, batch_prompt_tokens=64)
    found = search(trials, config, configurations("40%", ["stock", "all"]), 500 * MEGABYTE)  # type: ignore[arg-type]
    assert found["longest_tokens"].tolist() == [0, 128] and found["tokens_ratio"].isna().all()
    texts = [text.get_text() for axis in limits_figure(found, 64).axes for text in axis.texts]
    assert texts == ["0", "at least 128", "0", "at least 2", "none survived", "20"]
    assert list(beside_paper(found).columns) == ["what", "paper", "here", "why they differ"]


@pytest.mark.parametrize(
    ("launched", "outcome"),
    [
        (Launched(MEASURED, {"load_s": 1.0}), SURVIVED),
        (Launched(KILLED, {}, limit_hits=1), KILLED),
        (Launched(NO_MEMORY, {}), NO_MEMORY),
        (Launched(TOO_SLOW, {}, limit_hits=5), TOO_SLOW),
    ],
)
def test_only_want_of_memory_counts_against_a_configuration(launched: Launched, outcome: str) -> None:
    assert trial_outcome(launched) == outcome


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        (Launched(FAILED, {}, error="the budget is too small"), "another reason than memory: the budget is too small"),
        (Launched(TOO_SLOW, {}, duration_s=9.0), "longer than 9 s without reaching its limit"),
    ],
)
def test_any_other_failure_is_an_error(launched: Launched, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        trial_outcome(launched)


@pytest.mark.parametrize(
    "options", [{"limit": "40%"}, {"limit": "stock + 3 slots"}, {"base_tokens": 9000}, {"max_batch": 0}]
)
def test_settings_are_refused_where_they_are_made(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        SearchConfig(**options)  # type: ignore[arg-type]


def test_there_is_no_ratio_to_a_number_that_only_the_cap_set() -> None:
    trials = Computed({STOCK: 0, "emoe 100%": 0})
    config = SearchConfig(base_tokens=10, max_tokens=20, max_batch=2, batch_prompt_tokens=10)
    found = search(trials, config, configurations("40%", ["stock", "all"]), 500 * MEGABYTE)  # type: ignore[arg-type]
    assert found["tokens_capped"].all() and found["tokens_ratio"].isna().all() and found["batch_ratio"].isna().all()
    assert found["speed_ratio"].tolist() == [1.0, 1.0]


def test_unknown_configurations_are_refused() -> None:
    with pytest.raises(OptionError, match="choose of stock"):
        configurations("40%", ["stock", "half"])


@pytest.fixture
def trials(controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trials:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    return Trials(str(resolve_model(TINY)), controller, new_tokens=2)


@pytest.mark.long
def test_trials_under_a_real_limit_end_as_they_should_and_are_remembered(
    trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    emoe = configurations("50%", ["exact"])[0]
    fits = trials.run(emoe, 32, 2, 1500 * MEGABYTE)
    assert (
        fits.survived
        and fits.decode_tokens_per_s
        and (fits.group_peak_bytes is None or fits.group_peak_bytes > 50 * MEGABYTE)
    )
    killed = trials.run(emoe, 32, 2, 64 * MEGABYTE)
    assert killed.outcome == KILLED and killed.decode_tokens_per_s is None

    def forbidden(*_: object, **__: object) -> Launched:
        raise AssertionError("a finished trial must not run again")

    monkeypatch.setattr("workbench.measure.limit_trials.launch", forbidden)
    assert trials.run(emoe, 32, 2, 1500 * MEGABYTE) == fits
    assert trials.frame()["outcome"].tolist() == [SURVIVED, KILLED]
    assert isinstance(trials.frame(), pd.DataFrame) and len(trials.done) == 2
