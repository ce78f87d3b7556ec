"""Memory of the CPU's libraries that no estimate knows: what the heap keeps, and what the math library keeps.

Experts see changing numbers of tokens, so a prompt leaves behind activations of hundreds of sizes, and brings about a
hundred shapes of matrix product.

The C library's heap
--------------------
Small blocks that live longer (a math library's kernels, one for each shape) lie between the activations, so the heap
grows from prompt to prompt though nothing is alive. glibc returns free pages from the middle of the heap when asked;
asking is cheap, and a few times in a prompt is enough. Decoding steps are too small to matter. Other C libraries are
left alone. Where everything is resident asking delays the first token, so the engine asks only under a budget.

The math library's caches
-------------------------
In 16 bits, on processors that compute them, oneDNN keeps two things of each shape: a descriptor (PyTorch's cache of
them) and a compiled kernel (its own cache), 0.3 MB each, the last 1,024 of both. Descriptors are made again at no
measurable cost, so few are kept. A kernel costs about 0.3 ms to make again, so all are kept where all experts are
resident, and under a budget as many as `KERNELS`. Both libraries read their limits from the environment when they first
compute; what a user has set there stands. Results do not depend on either.

What both save is in docs/results/memory.md.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

DESCRIPTOR_LIMIT, KERNEL_LIMIT = "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
DESCRIPTORS = 16
KERNELS = 256
LAYERS_BETWEEN = 5
PROMPT_TOKENS = 32


def bound_kernel_caches(*, short_of_memory: bool) -> None:
    """Limit both caches where the environment does not; without effect once this process has computed in 16 bits.

    Parameters
    ----------
    short_of_memory : bool
        Also limit the kernels, whose making again costs time.
    """
    limits = {DESCRIPTOR_LIMIT: DESCRIPTORS} | ({KERNEL_LIMIT: KERNELS} if short_of_memory else {})
    for name, count in limits.items():
        if name not in os.environ:
            # Not into os.environ: what this process starts, such as stock transformers beside it, is not limited.
            os.putenv(name, str(count))


def return_free_memory() -> bool:
    """Hand free pages of the C library's heap back to the system; False where the library cannot."""
    trim = _malloc_trim()
    if trim is None:
        return False
    trim(0)
    return True


def trim_during_prompts(modules: Sequence[torch.nn.Module]) -> None:
    """Let the last of some modules, and every fifth before it, return free memory after a pass over a prompt.

    Parameters
    ----------
    modules : sequence of Module
        Experts of the MoE layers in order; their first argument is the hidden states [tokens, hidden].
    """
    if _malloc_trim() is None:
        return
    for module in modules[::-1][::LAYERS_BETWEEN]:
        module.register_forward_hook(_after)


def _after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    hidden = args[0] if args else None
    if isinstance(hidden, torch.Tensor) and hidden.device.type == "cpu" and hidden.shape[0] >= PROMPT_TOKENS:
        return_free_memory()


def _malloc_trim() -> Callable[[int], int] | None:
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
