"""Integration: every Mixture-of-Experts family of the installed transformers is served exactly, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import logging as transformers_logging
from typer.testing import CliRunner

from emoe_core.checkpoint.families import REFUSED, decorated_modules, families
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import UnsupportedFamilyError
from workbench.cli import app
from workbench.models.families import EXACT_ONLY, as_markdown, prove, recorded, refused
from workbench.models.reference.tiny_families import tiny_config

ROWS = {row.model_type: row for row in recorded()}
DOCUMENT = Path(__file__).parents[3] / "docs" / "families.md"
SERVED = [family.model_type for family in families() if family.model_type not in REFUSED]


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    transformers_logging.disable_progress_bar()


@pytest.mark.parametrize("model_type", SERVED)
def test_family_is_bit_identical_under_a_budget_and_rerouted_by_its_rule(model_type: str, tmp_path: Path) -> None:
    row = prove(model_type, tmp_path)
    assert row == ROWS.get(model_type), "the record is old: emoe model families --check all --write"


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_family_is_refused_by_name_and_reason(model_type: str, tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFamilyError, match=rf"'{model_type}'.*{REFUSED[model_type]}"):
        open_checkpoint(tmp_path)


def test_every_modeling_file_with_the_decorator_leads_to_a_family() -> None:
    lost = set(decorated_modules()) - {family.module for family in families()}
    assert not lost, f"transformers has decorated experts without a model type that loads: {sorted(lost)}"


def test_every_family_is_recorded_and_no_other() -> None:
    found = {family.model_type for family in families()} | set(REFUSED)
    assert not found - set(ROWS), "new families: prove them with emoe model families --check all --write"
    assert not set(ROWS) - found, "families that this transformers no longer has"
    assert all(ROWS[row.model_type] == row for row in refused())


def test_only_families_whose_router_follows_no_rule_are_exact_only() -> None:
    exact_only = {row.model_type for row in ROWS.values() if row.rerouting == EXACT_ONLY}
    # Choices by token id, by a sequence of masked softmaxes, and with a class that skips all experts.
    assert exact_only == {"deepseek_v4", "phimoe", "zaya"}


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == as_markdown(recorded()), (
        "write it again: emoe model families --markdown > docs/families.md"
    )


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_list_has_a_line_for_every_family_with_its_rule_or_reason(columns: str) -> None:
    answer = CliRunner().invoke(app, ["model", "families"], env={"COLUMNS": columns})
    assert answer.exit_code == 0
    for row in ROWS.values():
        (line,) = [line for line in answer.output.splitlines() if row.model_type in line.split()]
        assert (row.refused or row.rerouting) in line


def test_a_family_is_proven_on_request() -> None:
    answer = CliRunner().invoke(app, ["model", "families", "--check", "mixtral"])
    assert answer.exit_code == 0 and "exact" in answer.output and "softmax" in answer.output


def test_an_unknown_family_is_refused() -> None:
    answer = CliRunner().invoke(app, ["model", "families", "--check", "mixtrall"])
    assert answer.exit_code != 0 and "mixtrall" in str(answer.exception)
