"""Transformers with accelerate's disk offload: what does not fit the memory lies on disk and is read when used.

The memory that modules may take is ``cpu_bytes``; accelerate places whole decoder layers, in order, until it is full,
writes the rest to a folder of its own and reads a layer back through the page cache whenever it runs. That is the
standard way to run a model larger than memory with transformers, and knows nothing of experts.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workbench.systems.stock import TorchDecoder, load_stock


class OffloadedDecoder(TorchDecoder):
    """Options: ``cpu_bytes``, memory for weights. ``spec["scratch"]`` is a folder on disk for offloaded weights."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self._cpu_bytes = int(spec["options"]["cpu_bytes"])
        self._folder = tempfile.TemporaryDirectory(prefix="offload-", dir=spec["scratch"])
        try:
            self.model = load_stock(
                spec["checkpoint"],
                spec["dtype"],
                device_map="auto",
                max_memory={"cpu": self._cpu_bytes},
                offload_folder=self._folder.name,
            )
        except BaseException:
            self._folder.cleanup()
            raise

    def description(self) -> str:
        # There is no map where everything found room.
        places = list(getattr(self.model, "hf_device_map", {"": "cpu"}).values())
        written = sum(file.stat().st_size for file in Path(self._folder.name).rglob("*") if file.is_file())
        return (
            f"accelerate {version('accelerate')}, {places.count('disk')} of {len(places)} modules on disk "
            f"({written:,} bytes written), {self._cpu_bytes:,} bytes for weights"
        )

    def close(self) -> None:
        super().close()
        self._folder.cleanup()
