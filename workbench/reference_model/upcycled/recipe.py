"""The recipe: everything that turns the dense parent into the mixture, small enough to keep under version control.

A recipe is a folder: ``adapters.safetensors`` (stacked expert corrections and routers in bfloat16, names
``layers.<layer>.<part>``), ``recipe.json`` (shape, seed, plan, sources and hashes of the text), ``dialogues.jsonl.gz``
(text that no package ships), and after building and evaluating ``manifest.json`` (checksums of the built files) and
``figures.json`` (measured quality).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emoe_core.errors import CheckpointError
from workbench.cache import sha256_file
from workbench.reference_model.upcycled.mixture import MixtureFeedForward, Shape

DEFAULT_RECIPE = Path(__file__).parents[1] / "recipes" / "upcycled"
ADAPTERS = "adapters.safetensors"
DESCRIPTION = "recipe.json"
MANIFEST = "manifest.json"
FIGURES = "figures.json"
PARTS = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b", "router")
LIMIT_BYTES = 25_000_000


@dataclass(frozen=True)
class Recipe:
    """A checked recipe folder."""

    folder: Path
    description: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str | None = None) -> Recipe:
        """Read a recipe and check the adapters against the description.

        Raises
        ------
        CheckpointError
            When a file is missing or the adapters are not the described ones.
        """
        path = Path(folder) if folder is not None else DEFAULT_RECIPE
        if not (path / DESCRIPTION).exists() or not (path / ADAPTERS).exists():
            raise CheckpointError(f"{path} holds no recipe; run `emoe model train` to compute one.")
        description = json.loads((path / DESCRIPTION).read_text())
        found = sha256_file(path / ADAPTERS)
        if found != description["adapters_sha256"]:
            raise CheckpointError(
                f"{path / ADAPTERS} has SHA-256 {found}, its description says {description['adapters_sha256']}: "
                f"the recipe was altered. Restore the folder from version control."
            )
        return cls(path, description)

    @property
    def shape(self) -> Shape:
        """Experts, experts per token and rank."""
        return Shape(**self.description["shape"])

    @property
    def layers(self) -> int:
        """Number of layers that the recipe adapts."""
        return int(self.description["layers"])

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the parts of one layer in float32, read from the file when asked for."""
        try:
            with safe_open(self.folder / ADAPTERS, "pt") as file:
                return {part: file.get_tensor(f"layers.{index}.{part}").float() for part in PARTS}
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / ADAPTERS} cannot be read: {error}") from error


def save_recipe(folder: Path, mixtures: list[MixtureFeedForward], description: dict[str, Any]) -> Recipe:
    """Write adapters and description; `description` gains shape, layers and the adapters' checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"layers.{index}.{part}": getattr(mixture, part).detach().to(torch.bfloat16).contiguous()
        for index, mixture in enumerate(mixtures)
        for part in PARTS
    }
    partial = folder / f"{ADAPTERS}.part"
    save_file(tensors, partial)
    partial.replace(folder / ADAPTERS)
    size_bytes = (folder / ADAPTERS).stat().st_size
    if size_bytes > LIMIT_BYTES:
        raise CheckpointError(f"the recipe has {size_bytes} bytes, more than {LIMIT_BYTES}: lower the rank.")
    full = {
        "format": 1,
        "kind": "upcycled",
        "layers": len(mixtures),
        "shape": asdict(mixtures[0].shape),
        **description,
        "adapters_sha256": sha256_file(folder / ADAPTERS),
    }
    (folder / DESCRIPTION).write_text(json.dumps(full, indent=1) + "\n")
    return Recipe.open(folder)
