"""The recipe: everything that a model is built from, small enough to keep under version control.

A recipe is a folder: ``adapters.safetensors`` (tensors named ``layers.<layer>.<part>``), ``recipe.json`` (kind, shape,
seed, plan, sources and hashes of the text), and after building and evaluating ``manifest.json`` (checksums of the built
files) and ``figures.json`` (measured quality). Which parts a layer has is the kind's matter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emoe_core.errors import CheckpointError
from emoe_core.files import read_object, whole_file
from workbench.fetch import sha256_file
from workbench.models.reference import EMBEDDED, RECIPES

ADAPTERS = "adapters.safetensors"
DESCRIPTION = "recipe.json"
MANIFEST = "manifest.json"
FIGURES = "figures.json"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe folder; each kind derives its own with the kind's name and limit of size."""

    folder: Path
    description: dict[str, Any]
    kind: ClassVar[str]
    limit_bytes: ClassVar[int]

    @classmethod
    def open(cls, folder: Path | str | None = None) -> Self:
        """Read a recipe, the committed one when no folder is given, and check the tensors against the description.

        Raises
        ------
        CheckpointError
            When a file is missing, the recipe is of another kind, or the tensors are not the described ones.
        """
        path = Path(folder) if folder is not None else RECIPES / cls.kind
        if not (path / DESCRIPTION).exists() or not (path / ADAPTERS).exists():
            name = next((name for name, kind in EMBEDDED.items() if kind == cls.kind), cls.kind)
            raise CheckpointError(
                f"{path} holds no recipe; `python scripts/train_reference.py {name} --out FOLDER` computes one."
            )
        fix = "restore the folder from version control"
        description = read_object(path / DESCRIPTION, (1,), CheckpointError, "recipe", "a recipe", fix)
        if description.get("kind") != cls.kind:
            raise CheckpointError(f"{path} holds a recipe of the kind {description.get('kind')!r}, not {cls.kind!r}.")
        found, known = sha256_file(path / ADAPTERS), description.get("adapters_sha256")
        if found != known:
            raise CheckpointError(
                f"{path / ADAPTERS} has SHA-256 {found}, its description says {known}: "
                f"the recipe was altered. Restore the folder from version control."
            )
        return cls(path, description)

    @classmethod
    def save(
        cls, folder: Path, layers: list[dict[str, torch.Tensor]], shape: dict[str, int], description: dict[str, Any]
    ) -> Self:
        """Write tensors and description; `description` gains kind, shape, layers and the tensors' checksum.

        Parameters
        ----------
        folder : Path
            Made if missing.
        layers : list of dict
            Parts of each layer; floating-point ones are stored in bfloat16.
        """
        tensors = {
            f"layers.{index}.{part}": _stored(tensor)
            for index, parts in enumerate(layers)
            for part, tensor in parts.items()
        }
        return cls.save_tensors(folder, tensors, shape, {"layers": len(layers), **description})

    @classmethod
    def save_tensors(
        cls, folder: Path, tensors: dict[str, torch.Tensor], shape: dict[str, int], description: dict[str, Any]
    ) -> Self:
        """Write tensors as they are, and the description, which says how many ``layers`` there are; see `save`."""
        with whole_file(folder / ADAPTERS) as scratch:
            save_file(tensors, scratch)
            size_bytes = scratch.stat().st_size
            if size_bytes > cls.limit_bytes:
                raise CheckpointError(
                    f"the recipe has {size_bytes} bytes, more than {cls.limit_bytes}: lower the rank."
                )
        full = {
            "format": 1,
            "kind": cls.kind,
            "shape": shape,
            **description,
            "adapters_sha256": sha256_file(folder / ADAPTERS),
        }
        (folder / DESCRIPTION).write_text(json.dumps(full, indent=1) + "\n")
        return cls.open(folder)

    @property
    def base_sha256(self) -> str:
        """Checksum of what else the model is made from: the dense parent's weights."""
        return str(self.description["parent"]["gguf_sha256"])

    @property
    def layers(self) -> int:
        """Number of layers that the recipe adapts."""
        return int(self.description["layers"])

    @property
    def figures(self) -> dict[str, Any] | None:
        """The measured figures, or None when there are none of these very tensors."""
        stored = self.folder / FIGURES
        figures = json.loads(stored.read_text()) if stored.exists() else None
        return figures if figures and figures["adapters_sha256"] == self.description["adapters_sha256"] else None

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the parts of one layer by name, floating-point ones in float32, read from the file when asked for."""
        found = self.parts(f"layers.{index}.")
        return {part: tensor.float() if tensor.is_floating_point() else tensor for part, tensor in found.items()}

    def parts(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors whose names start with a prefix, as stored, by the rest of their names."""
        try:
            with safe_open(self.folder / ADAPTERS, "pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / ADAPTERS} cannot be read: {error}") from error


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
