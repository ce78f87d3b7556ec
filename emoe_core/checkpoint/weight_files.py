"""Which files of a checkpoint's directory hold its weights: those that stock transformers would load.

Only safetensors is read: formats that can carry code (pickled ``*.bin``) are refused, and so is whatever leads out of
the directory by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import is_peft_available

from emoe_core.checkpoint.safetensors_files import Shard, read_shard
from emoe_core.errors import CheckpointError
from emoe_core.files import parse, read_text

SUFFIX = ".safetensors"
INDEX_SUFFIX = f"{SUFFIX}.index.json"
SINGLE_NAME = f"model{SUFFIX}"
INDEX_NAME = f"model{INDEX_SUFFIX}"

_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_SAVE_AGAIN = (
    "emoe reads safetensors only: load the model once with transformers and save it again with save_pretrained()."
)


def find_shards(folder: Path, weights: str | None = None) -> tuple[tuple[Shard, ...], dict[str, object]]:
    """Return the shards that stock transformers loads of a directory, and the index file's metadata, empty without.

    A single file goes before an index: saving fewer shards than before leaves the older index behind. Of an index only
    the names of its files count, not which tensor it says to be where.

    Parameters
    ----------
    folder : Path
    weights : str, optional
        The file or index to take instead, as a configuration may name it (``transformers_weights``).

    Raises
    ------
    CheckpointError
        When there is no safetensors weight file, a shard is missing, or a file is truncated or malformed.
    """
    _refuse_other_weights(folder)
    if weights is not None:
        _require_safetensors((weights,), folder / "config.json")
    candidates = (SINGLE_NAME, INDEX_NAME) if weights is None else (weights,)
    chosen = next((name for name in candidates if _is_file(folder / name)), None)
    if chosen is None:
        raise _no_weights(folder, candidates)
    if chosen.endswith(INDEX_SUFFIX):
        return _sharded(folder, folder / chosen)
    return (read_shard(folder / chosen, chosen),), {}


def _refuse_other_weights(folder: Path) -> None:
    """Refuse files of whose weights stock transformers would make another model, and which are not read here."""
    distributed = next((entry.name for entry in folder.iterdir() if _DISTRIBUTED.fullmatch(entry.name)), None)
    if distributed is not None:
        raise CheckpointError(
            f"{folder} holds a distributed checkpoint ({distributed}), which emoe does not read. {_SAVE_AGAIN}"
        )
    if is_peft_available() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), which transformers would add to the weights and emoe "
            f"does not. Merge it (merge_and_unload() of peft) and save the model again, or remove the file."
        )


def _no_weights(folder: Path, candidates: tuple[str, ...]) -> CheckpointError:
    pickled = sorted(entry.name for entry in folder.glob("*.bin"))
    if pickled:
        return CheckpointError(
            f"{folder} holds only pickled weights ({pickled[0]}), and unpickling can run code. {_SAVE_AGAIN}"
        )
    return CheckpointError(
        f"{folder} has a configuration but no weights: expected {' or '.join(candidates)}. Fetch the model again."
    )


def _require_safetensors(names: Iterable[str], origin: Path) -> None:
    """Refuse what a file of the checkpoint names as weights unless it is safetensors and below the same directory."""
    for name in names:
        # The name alone counts: a link of that name may lead elsewhere, as all files of the hub's own cache do.
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{origin} names a file outside its directory: {name!r:.300}. Refused.")
        if not name.endswith((SUFFIX, INDEX_SUFFIX)):
            raise CheckpointError(f"{origin} names weights that are no safetensors file: {name!r:.300}. {_SAVE_AGAIN}")


def _sharded(folder: Path, index_file: Path) -> tuple[tuple[Shard, ...], dict[str, object]]:
    try:
        index = parse(read_text(index_file))
        weight_map = index["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError("weight_map is no object that names files")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{index_file} is not a safetensors index ({error!r:.200}). Fetch it again.") from error
    _require_safetensors(weight_map.values(), index_file)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not _is_file(folder / name)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards named in {index_file.name}: "
            f"{', '.join(map(repr, missing[:3])):.900}. Fetch the missing files."
        )
    metadata = index.get("metadata")
    return tuple(read_shard(folder / name, name) for name in names), metadata if isinstance(metadata, dict) else {}


def _is_file(file: Path) -> bool:
    """Say whether there is a file; also of a name that no file system takes, where ``Path.is_file`` raises."""
    return os.path.isfile(file)  # noqa: PTH113
