"""Measures a model that comes along on held-out text: the frame that every kind's own readings stand in."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from recipes.held_out import answers, compute_type
from workbench.models.reference.checkpoint import Assembly
from workbench.models.reference.recipe import FIGURES, Recipe
from workbench.systems.stock import load_stock


@dataclass(frozen=True)
class Built:
    """A built checkpoint to be measured: its recipe and folder, itself, its compute type, and tokens of a block."""

    recipe: Any
    folder: Path
    model: PreTrainedModel
    compute: torch.dtype
    block_tokens: int


def evaluate(
    kind: str,
    path: Path | str | None = None,
    recipe: Path | str | None = None,
    dtype: str = "float32",
    block_tokens: int = 256,
    with_answers: bool = True,
) -> dict[str, Any]:
    """Measure a built checkpoint; write ``figures.json`` beside the recipe, and the card.

    Parameters
    ----------
    kind : str
        ``upcycled``, ``carved`` or ``native``.
    path : Path or str, optional
        Built folder; left out: the default one, built when missing.
    recipe : Path or str, optional
        Its recipe; left out: the committed one.
    dtype : str
        Compute type, ``float32`` or ``bfloat16``.
    block_tokens : int
        Tokens of a block.
    with_answers : bool
        Also generate the five answers.
    """
    compute = compute_type(dtype)
    assembly: Assembly = importlib.import_module(f"workbench.models.reference.{kind}.build").ASSEMBLY
    chosen: Recipe = assembly.recipe.open(recipe)
    folder = assembly.build(path, chosen.folder)
    built = Built(chosen, folder, load_stock(folder, compute), compute, block_tokens)
    figures: dict[str, Any] = importlib.import_module(f"recipes.{kind}_evaluation").measured(built)
    figures |= {
        "adapters_sha256": chosen.description["adapters_sha256"],
        "dtype": dtype,
        "block_tokens": block_tokens,
        "answers": answers(built.model, folder) if with_answers else [],
    }
    (chosen.folder / FIGURES).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    assembly.write_card(folder, chosen)
    return figures
