"""What this machine's disk and memory deliver, measured: the roof over every figure of a bench.

Disk: random records of the model's own expert pack, read past the page cache into page-aligned memory, by 1 to 8
threads; the best rate counts, and the rates by number of threads are kept. Memory: a large buffer summed by torch's
threads, best of several; a decoded token must read its weights at least once. Where ``fio`` is installed its rate for
the same file and block size stands beside ours.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from emoe_core.device import aligned_buffer
from emoe_core.loader.pack import Pack
from emoe_core.loader.storage import PackedFile

THREADS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Bandwidths:
    """Rates in bytes a second.

    Attributes
    ----------
    disk_bytes_per_s : float
        Best over the numbers of threads.
    disk_by_threads : dict of str to float
    disk_direct : bool
        Whether reads went past the page cache; where not, the rate may be the memory's.
    block_bytes : int
    memory_bytes_per_s : float
    fio_bytes_per_s : float or None
        None where fio is not installed.
    """

    disk_bytes_per_s: float
    disk_direct: bool
    block_bytes: int
    memory_bytes_per_s: float
    disk_by_threads: dict[str, float] = field(default_factory=dict)
    fio_bytes_per_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return asdict(self)


def measure_bandwidths(pack: Pack, threads: int, seconds: float = 2.0, seed: int = 0) -> Bandwidths:
    """Measure disk and memory; each number of reading threads is given ``seconds``, computing uses ``threads``."""
    storage = PackedFile(pack, direct=True, verify="never")
    try:
        rates = {str(count): _disk_rate(pack, storage, count, seconds, seed) for count in THREADS}
        direct = storage.direct
    finally:
        storage.close()
    block = max(layer.spec.record_bytes for layer in pack.layers)
    return Bandwidths(max(rates.values()), direct, block, memory_rate(threads), rates, fio_rate(pack, block, seconds))


def _disk_rate(pack: Pack, storage: PackedFile, threads: int, seconds: float, seed: int) -> float:
    records = [(layer.spec.index, expert) for layer in pack.layers for expert in range(layer.spec.num_experts)]
    until = time.perf_counter() + seconds

    def read(number: int) -> int:
        order, done = random.Random(seed + number), 0
        buffer = aligned_buffer(max(layer.spec.record_bytes for layer in pack.layers))
        while time.perf_counter() < until:
            layer, expert = order.choice(records)
            storage.read_into(layer, expert, buffer)
            done += storage.record_bytes(layer)
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, range(threads)))
    return total / (time.perf_counter() - started)


def memory_rate(threads: int, size_bytes: int = 2**28, repeats: int = 5) -> float:
    """Return bytes a second that torch reads from memory with so many threads: the best of several sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.ones(size_bytes // 4, dtype=torch.float32)
        best = 0.0
        for _ in range(repeats):
            started = time.perf_counter()
            values.sum()
            best = max(best, size_bytes / (time.perf_counter() - started))
        return best
    finally:
        torch.set_num_threads(before)


def fio_rate(pack: Pack, block_bytes: int, seconds: float) -> float | None:
    """Return fio's rate of random direct reads of the pack, eight at once; None without fio or its answer."""
    if shutil.which("fio") is None:
        return None
    command = ["fio", "--name=pack", f"--filename={pack.path}", "--readonly", "--rw=randread", "--direct=1"]
    command += [f"--bs={block_bytes}", "--numjobs=8", "--group_reporting", "--time_based", f"--runtime={seconds:g}"]
    run = subprocess.run([*command, "--thread", "--output-format=json"], capture_output=True, text=True, check=False)
    try:
        return float(json.loads(run.stdout)["jobs"][0]["read"]["bw_bytes"])
    except (ValueError, KeyError, IndexError):
        return None
