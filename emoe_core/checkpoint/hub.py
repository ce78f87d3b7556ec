"""Models of the Hugging Face hub: how their names look, and fetching one. Nothing heavy is imported for the former."""

from __future__ import annotations

import re
from pathlib import Path

from emoe_core.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def download(hub_id: str) -> Path:
    """Return the folder of a hub model, fetched or from the hub's own cache; `CheckpointError` when neither works."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted)).resolve()
    except Exception as error:  # the hub client raises many unrelated types when offline or refused
        raise CheckpointError(
            f"{hub_id!r} is no directory here, and the hub could not be asked for it ({type(error).__name__}). Check "
            f"the name and the network, or give a local directory."
        ) from error
