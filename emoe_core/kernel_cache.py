"""Bounding what the CPU's math library keeps of every shape that it has met.

Experts see changing numbers of tokens, so a prompt brings about a hundred shapes of matrix product. In 16 bits, on
processors that compute them, oneDNN keeps two things of each: a descriptor (PyTorch's cache of them) and a compiled
kernel (its own cache), 0.3 MB each, the last 1,024 of both: up to 0.6 GB that no estimate knows. Descriptors are made
again at no measurable cost, so few are kept. A kernel costs about 0.3 ms to make again, so all are kept where all
experts are resident, and under a budget as many as `KERNELS`. Both libraries read their limits from the environment
when they first compute; what a user has set there stands. Results do not depend on either.

Measured on the embedded model in bfloat16 (2 cores of an AMD EPYC with native bfloat16, five prompts, 20% of experts,
exact): peak of the model 726 MB with both at 1,024, 603 MB with 16 descriptors, 535 MB with 256 kernels as well (first
token 8% later), 465 MB with 64 (first token 8% later, 33% where all experts are resident).
"""

from __future__ import annotations

import os

DESCRIPTOR_LIMIT, KERNEL_LIMIT = "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
DESCRIPTORS = 16
KERNELS = 256


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
