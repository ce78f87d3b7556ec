"""A notebook's parameters are read from its namespace, and become configurations without being listed again."""

from __future__ import annotations

import pytest

from emoe_core.errors import OptionError
from workbench.quality.configuration import ExperimentConfig
from workbench.tracking.parameters import config_from, listed, parameters_of

# What a kernel holds once the cells of parameters have run.
NAMESPACE = {
    "__name__": "__main__",
    "_i": "a cell's text",
    "In": ["", "a cell"],
    "budget": "40%",
    "n_prompts": 4,
    "max_quality_loss": None,
    "intervals": "1,8",
    "quit": print,
}
PARAMETERS = {"budget": "40%", "n_prompts": 4, "max_quality_loss": None, "intervals": "1,8"}


def test_parameters_are_the_scalars_that_a_notebook_starts_with() -> None:
    assert parameters_of(NAMESPACE) == PARAMETERS


def test_a_cell_that_is_run_again_reads_new_values_and_no_new_names() -> None:
    later = {**NAMESPACE, "parameters": parameters_of(NAMESPACE), "budget": "60%", "best": "lru", "row": 3}
    assert parameters_of(later) == {**PARAMETERS, "budget": "60%"}


def test_a_configuration_takes_the_parameters_that_it_knows_and_is_checked() -> None:
    config = config_from(ExperimentConfig, PARAMETERS, interval=8, n_prompts=5)
    assert (config.budget, config.interval, config.n_prompts) == ("40%", 8, 5)
    assert config.strategy == ExperimentConfig.strategy
    with pytest.raises(OptionError, match="unknown strategy"):
        config_from(ExperimentConfig, {"strategy": "guess"})


def test_a_list_is_comma_separated_text_or_the_number_that_a_sweep_made_of_one() -> None:
    assert listed(" 50%, 60% ,") == ["50%", "60%"]
    assert listed(0.2) == ["0.2"]
