"""Carry out runs on this machine, as many at once as its cores, memory and GPUs hold.

Timing runs one at a time with the machine to itself: an exclusive lock that other sweeps of the same store wait for.
Quality runs share the machine. Where there are GPUs, each run sees only those that it was given.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from emoe_core.errors import ExperimentError
from workbench.machine.control_groups import memory_limit_bytes
from workbench.machine.environment import available_cores, driver_gpus
from workbench.sweep.executors.notebook_process import NotebookProcess
from workbench.sweep.executors.protocol import Ending, Job, Kind
from workbench.sweep.schema import Needs
from workbench.tracking.place import HOME_VARIABLE, project_root
from workbench.tracking.store import machine_held

POLL_S = 0.1
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREAD_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Machine:
    """What this machine has for runs: cores, free memory, and names of GPUs as CUDA takes them."""

    cores: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()

    @staticmethod
    def here() -> Machine:
        """Return what this process may use of this machine now."""
        limit = memory_limit_bytes()
        free = psutil.virtual_memory().available
        return Machine(available_cores(), min(free, limit) if limit else free, visible_gpus())

    def gpus_of(self, needs: Needs) -> int:
        """Return how many GPUs a run takes: unless said otherwise one, where there are any."""
        return min(1, len(self.gpus)) if needs.gpus is None else needs.gpus

    def capacity(self, needs: Needs) -> int:
        """Return how many runs with the same needs fit at once."""
        counts = [self.cores // needs.cores, self.memory_bytes // needs.memory]
        if gpus := self.gpus_of(needs):
            counts.append(len(self.gpus) // gpus)
        return min(counts)


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use: ``CUDA_VISIBLE_DEVICES`` where set, else all that the driver lists."""
    chosen = os.environ.get(GPU_VARIABLE)
    if chosen is not None:
        return tuple(name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1"))
    return tuple(str(number) for number in range(len(driver_gpus())))


@dataclass(frozen=True)
class Running:
    """A job whose process runs, and the GPUs that it holds."""

    job: Job
    process: NotebookProcess
    gpus: tuple[str, ...]


class LocalExecutor:
    """Runs on this machine.

    Parameters
    ----------
    scratch : Path
        Folder for files of running jobs; emptied at the start.
    most : int
        At most so many at once, for the sake of the store.
    jobs : int, optional
        Exactly so many at once, whatever cores and memory say; GPUs are never shared.
    machine : Machine, optional
        This one when missing.
    tell : callable, optional
        Called with a sentence when the machine has to be waited for.
    """

    def __init__(
        self,
        scratch: Path,
        *,
        most: int,
        jobs: int | None = None,
        machine: Machine | None = None,
        tell: Callable[[str], object] = print,
    ) -> None:
        self._scratch, self._most, self._jobs, self._tell = scratch, most, jobs, tell
        self._machine = machine or Machine.here()
        self._running: dict[str, Running] = {}
        shutil.rmtree(scratch, ignore_errors=True)

    @contextlib.contextmanager
    def stage(self, kind: Kind) -> Iterator[None]:
        """Hold the machine alone for timing, shared for quality; say so when that means waiting."""
        with machine_held(kind == "timing", self._tell):
            yield

    def at_once(self, needs: Needs, kind: Kind) -> int:
        """Return how many jobs like this one run at once; at least one, on a machine however small."""
        if kind == "timing":
            return 1
        return max(1, min(self._most, self._jobs or self._machine.capacity(needs)))

    def has_room(self, needs: Needs, kind: Kind) -> bool:
        """Say whether such a job can start beside those that run."""
        if self._machine.gpus_of(needs) > len(self._machine.gpus):
            raise ExperimentError(
                f"a run needs {needs.gpus} GPUs, this machine offers {len(self._machine.gpus)}: "
                "change `needs` in the sweep file, or run it elsewhere (--executor ray)."
            )
        if not self._running:
            return True
        if len(self._free_gpus()) < self._machine.gpus_of(needs) or len(self._running) >= self.at_once(needs, kind):
            return False
        if self._jobs:
            return True
        others = [item.job.needs for item in self._running.values()]
        cores = self._machine.cores - sum(other.cores for other in others)
        memory = self._machine.memory_bytes - sum(other.memory for other in others)
        return replace(self._machine, cores=cores, memory_bytes=memory, gpus=self._free_gpus()).capacity(needs) > 0

    def start(self, job: Job) -> None:
        """Start the job's process."""
        gpus = self._free_gpus()[: self._machine.gpus_of(job.needs)]
        environment = {HOME_VARIABLE: str(project_root())}
        if self._machine.gpus:
            environment[GPU_VARIABLE] = ",".join(gpus)
        beside = self.at_once(job.needs, job.kind)
        if beside > 1 and THREAD_VARIABLE not in os.environ:
            environment[THREAD_VARIABLE] = str(max(1, self._machine.cores // beside))
        folder = self._scratch / job.run_id
        process = NotebookProcess(job.run_id, job.notebook, job.parameters, folder, environment)
        self._running[job.run_id] = Running(job, process, gpus)

    def wait(self) -> list[Ending]:
        """Return the jobs that ended; waits a moment when none did."""
        ended = [run_id for run_id, item in self._running.items() if not item.process.runs()]
        if not ended:
            time.sleep(POLL_S)
        return [self._running.pop(run_id).process.ending() for run_id in ended]

    def forget(self, ending: Ending) -> None:
        """Remove the files of a job."""
        shutil.rmtree(self._scratch / ending.run_id, ignore_errors=True)

    def stop(self) -> None:
        """Kill what still runs, kernels included."""
        for item in self._running.values():
            item.process.kill()
        self._running.clear()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _free_gpus(self) -> tuple[str, ...]:
        taken = {name for item in self._running.values() for name in item.gpus}
        return tuple(name for name in self._machine.gpus if name not in taken)
