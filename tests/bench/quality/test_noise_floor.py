"""The noise floor is measured on the run's own prompts, and asks for answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_encoder import tiny_encoder

from emoe_core.errors import OptionError
from workbench.models.reference.tiny import tiny_moe
from workbench.quality import similarity
from workbench.quality.configuration import ExperimentConfig
from workbench.quality.noise_floor import VARIANTS, noise_floor


@pytest.mark.long
def test_rounding_parts_some_texts_and_leaves_the_parted_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(similarity, "encoder", tiny_encoder)
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral", seed=3)
    config = ExperimentConfig(
        model=str(checkpoint), source="fixture", n_prompts=8, answers=8, max_new_tokens=24, warm_prompts=0
    )
    found = noise_floor(config).set_index("label")
    assert list(found.index) == list(VARIANTS) and (found["prompts"] == 8).all()
    grouped, coarse = found.loc["grouped products"], found.loc["bfloat16"]
    assert (grouped["identical"], grouped["similarity"]) == (1.0, pytest.approx(1.0))
    assert coarse["identical"] < coarse["similarity"] < 1.0, "texts that part after a while are no strangers"
    assert coarse["similarity_low"] <= coarse["similarity"] <= coarse["similarity_high"] <= 1.0


def test_without_answers_there_is_no_floor() -> None:
    with pytest.raises(OptionError, match="answers"):
        noise_floor(ExperimentConfig(model="tiny", source="fixture"))
