"""The noise floor is measured on the run's own prompts, and asks for answers."""

from __future__ import annotations

import pytest

from emoe_core.errors import OptionError
from workbench.models.reference.tiny import tiny_moe
from workbench.quality import noise_floor as module
from workbench.quality.configuration import ExperimentConfig
from workbench.quality.noise_floor import VARIANTS, noise_floor


def test_rounding_alone_leaves_most_texts_of_a_small_model_as_they_are(tmp_path, monkeypatch) -> None:
    # MiniLM's package is not fetched by tests: equal texts stand in for alike ones.
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral", seed=3)

    def same(texts_a, texts_b):
        return module.pd.Series([float(a == b) for a, b in zip(texts_a, texts_b, strict=True)]).to_numpy()

    monkeypatch.setattr(module, "similarity", same)
    config = ExperimentConfig(
        model=str(checkpoint), source="fixture", n_prompts=4, answers=3, max_new_tokens=4, warm_prompts=0
    )
    found = noise_floor(config).set_index("label")
    assert list(found.index) == list(VARIANTS)
    assert (found["prompts"] == 3).all()
    assert (found["similarity"] == found["identical"]).all()
    assert found.loc["grouped products", "identical"] == 1.0
    assert found[["similarity_low", "similarity_high"]].isna().all(axis=None), "three prompts have no interval"


def test_without_answers_there_is_no_floor() -> None:
    with pytest.raises(OptionError, match="answers"):
        noise_floor(ExperimentConfig(model="tiny", source="fixture"))
