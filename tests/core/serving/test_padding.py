"""In which families stock transformers answers a padded prompt as it answers it alone, and in which it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import logging as transformers_logging

from workbench.models.families import PADDING_CHANGES, recorded
from workbench.models.reference.tiny_families import FIRST_PLAIN_TOKEN, VOCABULARY, tiny_family

# Further families whose attention picks or compresses tokens: they leave padding out. And one that does neither.
MASKED = ("glm5_next", "minimax_m3_vl_text", "qwen4_exp_text", "mixtral")
PROMPT_TOKENS, PADDED_TOKENS = 50, 70


def _first_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    answer = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.as_tensor(answer.logits[0][0])


@pytest.mark.parametrize("model_type", [*PADDING_CHANGES, *MASKED])
def test_padding_changes_answers_of_exactly_the_families_that_are_named(model_type: str, tmp_path: Path) -> None:
    transformers_logging.disable_progress_bar()
    model: Any = tiny_family(tmp_path, model_type).from_pretrained(tmp_path, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (1, PROMPT_TOKENS), generator=generator)
    padding = torch.zeros(1, PADDED_TOKENS - PROMPT_TOKENS, dtype=torch.long)
    alone = _first_logits(model, ids, torch.ones_like(ids))
    padded = _first_logits(model, torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1))
    off = ((padded - alone).abs().max() / alone.abs().max()).item()
    assert off > 1e-2 if model_type in PADDING_CHANGES else off < 1e-4


def test_the_named_families_are_served() -> None:
    assert set(PADDING_CHANGES) <= {row.model_type for row in recorded() if not row.refused}
