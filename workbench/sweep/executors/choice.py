"""The executors by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from emoe_core.errors import OptionError, require_known
from workbench.sweep.executors.local import LocalExecutor
from workbench.sweep.executors.protocol import Executor

EXECUTORS = ("local", "ray")


class ExecutorMaker(Protocol):
    """Makes an executor for one sweep."""

    def __call__(self, scratch: Path, *, most: int, jobs: int | None, tell: Callable[[str], object]) -> Executor:
        """Return an executor that keeps its files in `scratch`, runs at most `most` at once, or `jobs` where given."""


def executor_maker(name: str = "local", ray_address: str | None = None) -> ExecutorMaker:
    """Return what makes the named executor: ``local`` or ``ray``.

    Raises
    ------
    OptionError
        When there is no such executor, or an address is given to one that has none.
    """
    require_known(name, EXECUTORS, "executor")
    if name == "ray":

        def on_ray(scratch: Path, *, most: int, jobs: int | None, tell: Callable[[str], object]) -> Executor:
            from workbench.sweep.executors.ray_cluster import RayExecutor

            return RayExecutor(scratch, most=jobs or most, address=ray_address, tell=tell)

        return on_ray
    if ray_address is not None:
        raise OptionError("--ray-address goes with --executor ray.")
    return LocalExecutor
