"""What a run ran on: versions, processor, memory, GPU, source revision and the identity of model and data.

Terms: an *environment* is a flat record that two runs can be compared by. `describe_environment` reads it from this
process and this machine; `Environment.tags` gives the few entries worth filtering runs by.

It does not measure speed and it imports neither torch nor CUDA: where torch is already loaded it is asked, otherwise
the installed packages and the operating system are.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).parents[2]
ENVIRONMENT_TAGS = "env."
IDENTITY = ("seed", "dtype", "model_hash", "data_hash", "reference_hash")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "datasets", "mlflow", "papermill")
# The instruction sets that decide how fast, and in which rounding, a matrix product runs.
NOTABLE_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")

DETERMINISM_VARIABLES = (
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTHONHASHSEED",
)


@dataclass(frozen=True)
class Environment:
    """One machine and one process, as recorded with a run.

    Attributes
    ----------
    packages : dict of str to str
        Versions of the packages that decide a result; missing ones are left out.
    cpu_flags : list of str
        Those of `NOTABLE_CPU_FLAGS` that the processor has.
    cores, threads : int
        Processor cores that this process may use; threads that torch computes with.
    ram_bytes : int
        Memory of the machine.
    gpus : list of str
        Names of the CUDA devices, empty without one.
    commit : str or None
        Git revision of the project, `dirty` when tracked files differ from it.
    determinism : dict of str to str
        Settings that decide in which order, and by which kernels, sums are made (`determinism_settings`).
    lock_hash : str or None
        Tells one set of installed packages from another; the set itself is recorded beside it (`installed_packages`).
    model_hash, data_hash, reference_hash, seed, dtype
        Identity of what was run (`IDENTITY`); None where a run has none. ``reference_hash`` tells which continuations
        quality was scored on.
    """

    python: str
    executable: str
    platform: str
    packages: dict[str, str]
    cpu: str
    cpu_flags: list[str]
    cores: int
    threads: int
    ram_bytes: int
    gpus: list[str] = field(default_factory=list)
    commit: str | None = None
    dirty: bool | None = None
    determinism: dict[str, str] = field(default_factory=dict)
    lock_hash: str | None = None
    seed: int | None = None
    dtype: str | None = None
    model_hash: str | None = None
    data_hash: str | None = None
    reference_hash: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain types, ready for JSON."""
        return asdict(self)

    def tags(self) -> dict[str, str]:
        """Return the entries that runs are filtered by, as MLflow tags with the prefix ``env.``."""
        tags = {
            "env.python": self.python,
            "env.cpu": self.cpu,
            "env.cores": str(self.cores),
            "env.threads": str(self.threads),
            "env.gpu": ", ".join(self.gpus) or "none",
            "env.commit": f"{self.commit or 'unknown'}{' (modified)' if self.dirty else ''}",
        }
        tags |= {f"env.{name}": self.packages[name] for name in ("torch", "transformers") if name in self.packages}
        known = {name: getattr(self, name) for name in IDENTITY}
        return tags | {f"env.{name}": str(value) for name, value in known.items() if value is not None}


def describe_environment(**identity: Any) -> Environment:
    """Read the environment of this process; ``identity`` (fields of `IDENTITY`) is passed into the record."""
    assert set(identity) <= set(IDENTITY), identity
    commit, dirty = git_revision()
    name, flags = describe_cpu()
    return Environment(
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        packages=installed_versions(PACKAGES),
        cpu=name,
        cpu_flags=flags,
        cores=available_cores(),
        threads=compute_threads(),
        ram_bytes=psutil.virtual_memory().total,
        gpus=gpu_names(),
        commit=commit,
        dirty=dirty,
        determinism=determinism_settings(),
        lock_hash=hashlib.sha256("\n".join(installed_packages()).encode()).hexdigest()[:16],
        **identity,
    )


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each distribution that is installed, without importing it."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@cache
def installed_packages() -> tuple[str, ...]:
    """Return every installed package as ``name==version``, sorted: what ``pip install -r`` would bring back."""
    found = {str(item.name).lower(): item.version for item in importlib.metadata.distributions() if item.name}
    return tuple(f"{name}=={version}" for name, version in sorted(found.items()))


def determinism_settings() -> dict[str, str]:
    """Return variables that are set, and torch's switches where it is loaded; the number of threads is told apart."""
    found = {name: os.environ[name] for name in DETERMINISM_VARIABLES if name in os.environ}
    torch = sys.modules.get("torch")
    if torch is not None:
        found |= {
            "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
            "float32_matmul_precision": str(torch.get_float32_matmul_precision()),
            "cudnn.deterministic": str(torch.backends.cudnn.deterministic),
            "cudnn.benchmark": str(torch.backends.cudnn.benchmark),
        }
    return found


def describe_cpu() -> tuple[str, list[str]]:
    """Return the processor's name and its notable flags (empty where the system does not list them)."""
    listing = Path("/proc/cpuinfo")
    name, flags = platform.processor() or platform.machine(), set()
    if listing.exists():
        for line in listing.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return name, [flag for flag in NOTABLE_CPU_FLAGS if flag in flags]


def available_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def compute_threads() -> int:
    """Return torch's thread count where torch is loaded, else ``OMP_NUM_THREADS``, else the cores."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() else available_cores()


def gpu_names() -> list[str]:
    """Return the names of the CUDA devices, asked from torch where it is loaded, else from the driver's tool."""
    torch = sys.modules.get("torch")
    if torch is not None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [torch.cuda.get_device_name(index) for index in range(count)]
    return driver_gpus()


def driver_gpus() -> list[str]:
    """Return the names of the GPUs that NVIDIA's driver lists, whatever torch can use; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def code_hash(folders: Iterable[Path] = (PROJECT / "workbench", PROJECT / "emoe_core")) -> str:
    """Return a hash of the Python sources of some folders: those of both packages when none are named."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def git_revision() -> tuple[str | None, bool | None]:
    """Return (commit, whether tracked files were modified) of this code, or (None, None) outside its checkout."""
    if shutil.which("git") is None or _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    """Return what git says about the folder of this file, or None when it refuses."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None
