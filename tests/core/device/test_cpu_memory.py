"""What the math library keeps of each shape is bounded; in fresh processes, as limits hold from their start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from emoe_core.device.cpu_memory import DESCRIPTOR_LIMIT, KERNEL_LIMIT

# Computes with 300 shapes and prints by how many bytes what the C library's heap holds has grown.
GROWTH = """
import ctypes, sys, torch
from emoe_core.device.cpu_memory import bound_kernel_caches
if sys.argv[1] == "bounded":
    bound_kernel_caches(short_of_memory=True)
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used g h".split()]
library = ctypes.CDLL(None)
library.mallinfo2.restype = Heap
weight = torch.zeros(64, 96, dtype=torch.bfloat16)
for tokens in range(1, 301):
    torch.nn.functional.linear(torch.zeros(tokens, 96, dtype=torch.bfloat16), weight)
    if tokens == 20:
        before = library.mallinfo2().used
print(library.mallinfo2().used - before)
"""
ENVIRONMENT = """
import os, ctypes
from emoe_core.device.cpu_memory import bound_kernel_caches
library = ctypes.CDLL(None)
library.getenv.restype = ctypes.c_char_p
def seen():
    return [library.getenv(name) for name in (b"LRU_CACHE_CAPACITY", b"ONEDNN_PRIMITIVE_CACHE_CAPACITY")]
bound_kernel_caches(short_of_memory=False)
print(seen())
bound_kernel_caches(short_of_memory=True)
print(seen(), sorted(name for name in os.environ if "CAPACITY" in name))
"""


def run(program: str, *arguments: str, **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in (DESCRIPTOR_LIMIT, KERNEL_LIMIT)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True).stdout.strip()


def test_only_the_own_process_is_limited_and_kernels_only_under_a_budget() -> None:
    assert run(ENVIRONMENT).splitlines() == ["[b'16', None]", "[b'16', b'256'] []"]


def test_what_a_user_has_set_stands() -> None:
    assert run(ENVIRONMENT, **{DESCRIPTOR_LIMIT: "7"}).splitlines()[-1] == "[b'7', b'256'] ['LRU_CACHE_CAPACITY']"


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not compute in bfloat16")
def test_the_heap_grows_by_less_when_bounded() -> None:
    free, bounded = int(run(GROWTH, "free")), int(run(GROWTH, "bounded"))
    assert free > 280 * 100_000, "the library keeps hundreds of kilobytes of each shape"
    assert bounded < 0.6 * free
