"""llama.cpp through llama-cpp-python: a GGUF file, memory-mapped, decoding given tokens.

The package is an optional extra (it is compiled on installation). Nothing of torch is imported here, so that the
process is as small as llama.cpp's own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

EXTRA = (
    "it needs the extra 'llama': CMAKE_ARGS=\"-DGGML_NATIVE=ON\" pip install -c constraints.txt -e '.[llama]' "
    "(compiles for some minutes; needs cmake and a C++ compiler)"
)


def is_installed() -> bool:
    """Whether llama-cpp-python can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaDecoder:
    """Options: ``threads``; ``spec["gguf"]`` is the file, ``spec["max_tokens"]`` the longest sequence."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from llama_cpp import Llama

        threads = int(spec["options"].get("threads", spec["threads"]))
        self._threads = threads
        self.model = Llama(
            model_path=spec["gguf"],
            n_ctx=int(spec["max_tokens"]),
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            use_mmap=True,
            use_mlock=False,
            verbose=False,
        )

    def prefill(self, token_ids: Sequence[int]) -> int:
        self.model.reset()
        return self._step(list(token_ids))

    def decode(self, token_id: int) -> int:
        return self._step([token_id])

    def logits(self) -> Any:
        """Return the logits after the last token, float32 [vocabulary]."""
        import numpy as np

        pointer = self.model._ctx.get_logits_ith(-1)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab(),)).copy()

    def counters(self) -> dict[str, float]:
        return {}

    def description(self) -> str:
        return f"llama.cpp by llama-cpp-python {version('llama-cpp-python')}, mapped file, {self._threads} threads"

    def close(self) -> None:
        self.model.close()

    def _step(self, token_ids: list[int]) -> int:
        self.model.eval(token_ids)
        return int(self.logits().argmax())
