"""Writes the stock checkpoint of transformers that a recipe stands for, layer by layer.

The result is the same to the last bit on every machine: no kind lets a matrix library decide a rounding. The
checksums of the weight files are stored with the recipe (``manifest.json``) and checked after building. A built folder
also lists the checksums of all its files in ``checksums.json``, for `verify`. What a layer consists of is the kind's
matter (`Assembly`); the kinds that grow from the dense model share `parent`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from emoe_core.errors import CheckpointError
from emoe_core.files import whole_folder
from workbench.fetch import cache_dir, sha256_file
from workbench.models.reference import dense
from workbench.models.reference.recipe import MANIFEST, Recipe

LAYERS_PER_SHARD = 3
CHECKSUMS = "checksums.json"
INDEX = "model.safetensors.index.json"
CARD = "README.md"


@dataclass(frozen=True)
class Ingredients:
    """What a checkpoint consists of.

    Attributes
    ----------
    config : PreTrainedConfig
        Configuration of the built model.
    tokenizer : PreTrainedTokenizerFast
    ends : callable
        Makes the tensors that belong to no layer, in bfloat16.
    layer : callable
        From a layer's number to its tensors, in bfloat16.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerFast
    ends: Callable[[], dict[str, torch.Tensor]]
    layer: Callable[[int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Assembly:
    """How one kind of reference model is put together.

    Attributes
    ----------
    stem : str
        First part of the folder's name in the cache.
    version : int
        Raised whenever the built bytes change.
    recipe : type
        The kind's recipe class.
    ingredients : callable
        From recipe and dense parent (None: fetched, where the kind has one) to what is written.
    card : callable
        From recipe and figures (or None) to the model card.
    """

    stem: str
    version: int
    recipe: type[Recipe]
    ingredients: Callable[[Any, dense.DenseSource | None], Ingredients]
    card: Callable[[Any, dict[str, Any] | None], str]

    def content_key(self, recipe: Recipe) -> str:
        """Return the hash of everything that decides the files: what it is made from, adapters, builder."""
        parts = (recipe.base_sha256, recipe.description["adapters_sha256"], self.version)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def default_destination(self, recipe: Recipe) -> Path:
        """Return where `build` puts the checkpoint of a recipe when no destination is given."""
        return cache_dir() / "models" / f"{self.stem}-{self.content_key(recipe)[:12]}"

    def is_built(self, recipe: Path | str | None = None) -> bool:
        """Tell whether the default destination of a recipe holds a complete checkpoint."""
        return _complete(self.default_destination(self.recipe.open(recipe)))

    def build(
        self,
        dest: Path | str | None = None,
        recipe: Path | str | None = None,
        source: dense.DenseSource | None = None,
    ) -> Path:
        """Build the checkpoint, or return it when it is there already.

        Parameters
        ----------
        dest : Path or str, optional
            Folder of the checkpoint; left out: a folder of the cache named by content.
        recipe : Path or str, optional
            Recipe folder; left out: the committed one.
        source : DenseSource, optional
            The dense parent; left out: fetched, with its checksum checked.

        Returns
        -------
        Path
            A folder that ``AutoModelForCausalLM.from_pretrained`` loads.

        Raises
        ------
        CheckpointError
            When the recipe is altered, the result differs from the recipe's manifest, or the destination holds
            something else.
        DataError
            When the parent cannot be fetched or is altered.
        """
        chosen = self.recipe.open(recipe)
        target = Path(dest) if dest is not None else self.default_destination(chosen)
        if _complete(target):
            if json.loads((target / CHECKSUMS).read_text())["content_key"] == self.content_key(chosen):
                return target
            raise CheckpointError(f"{target} holds another build; give another destination or delete the folder.")
        if target.exists() and any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty and not a complete build; give another destination.")
        made = self.ingredients(chosen, source)
        with whole_folder(target) as scratch:
            self._write(scratch, made, chosen)
        return target

    def verify(self, path: Path | str | None = None) -> dict[str, str]:
        """Hash every file of a built folder again and compare.

        Returns
        -------
        dict of str to str
            Checksum by file name.

        Raises
        ------
        CheckpointError
            When a file is missing or altered; the message names the files.
        """
        folder = Path(path) if path is not None else self.default_destination(self.recipe.open())
        if not _complete(folder):
            raise CheckpointError(f"{folder} holds no complete build; run `emoe model build`.")
        expected = json.loads((folder / CHECKSUMS).read_text())["files"]
        bad = [
            name
            for name, sha256 in expected.items()
            if not (folder / name).exists() or sha256_file(folder / name) != sha256
        ]
        if bad:
            raise CheckpointError(
                f"altered or missing in {folder}: {', '.join(bad)}. Delete the folder and build again."
            )
        return dict(expected)

    def write_card(self, folder: Path, recipe: Recipe) -> None:
        """Write the card of a built model, with the recipe's figures where they belong to the same tensors."""
        (folder / CARD).write_text(self.card(recipe, recipe.figures))

    def _write(self, folder: Path, made: Ingredients, recipe: Recipe) -> None:
        config = made.config
        config.dtype = torch.bfloat16
        layers = recipe.layers
        groups = [range(i, min(i + LAYERS_PER_SHARD, layers)) for i in range(0, layers, LAYERS_PER_SHARD)]
        shards = len(groups) + 1
        weight_map: dict[str, str] = {}
        total_bytes = 0
        for number, group in enumerate(tqdm([range(0), *groups], desc="build", unit="shard"), start=1):
            tensors = {} if group else made.ends()
            for layer in group:
                tensors |= made.layer(layer)
            name = f"model-{number:05d}-of-{shards:05d}.safetensors"
            save_file(tensors, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        self._check_manifest(folder, recipe)
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        names = sorted(entry.name for entry in folder.iterdir())
        record = {
            "content_key": self.content_key(recipe),
            "builder_version": self.version,
            "files": {name: sha256_file(folder / name) for name in names},
        }
        # The card shows figures that are measured on the built model, so it is written again later and not hashed.
        self.write_card(folder, recipe)
        (folder / CHECKSUMS).write_text(json.dumps(record, indent=1) + "\n")

    def _check_manifest(self, folder: Path, recipe: Recipe) -> None:
        """Compare the weight files with the recipe's manifest; write the manifest when the recipe is new."""
        found = {entry.name: sha256_file(entry) for entry in sorted(folder.glob("*.safetensors"))}
        path = recipe.folder / MANIFEST
        expected = json.loads(path.read_text()) if path.exists() else {}
        if expected.get("content_key") != self.content_key(recipe):
            record = {"content_key": self.content_key(recipe), "files": found}
            path.write_text(json.dumps(record, indent=1) + "\n")
            return
        wrong = sorted(name for name in expected["files"] if found.get(name) != expected["files"][name])
        if wrong:
            raise CheckpointError(
                f"the built weights differ from the recipe's manifest in {', '.join(wrong)}: the disk or memory is "
                f"faulty, or the builder was changed without a new version. Nothing was kept."
            )


def _complete(folder: Path) -> bool:
    return (folder / CHECKSUMS).exists()
