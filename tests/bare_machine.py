"""A machine with a GPU's Python, as far as one can be had here: without a network, and without packages it would lack.

Its interpreter is this one. A ``sitecustomize`` on its path hides packages: some are nowhere, others lie in a kit of
wheels only, made from what is installed here.
"""

from __future__ import annotations

import importlib.metadata
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

ABSENT = ("papermill", "mlflow", "datasets", "ray", "seaborn", "gguf", "jupytext", "nbformat", "fastapi", "xdist")
IN_KIT = {"pydantic": "pydantic", "annotated_types": "annotated-types", "sortedcontainers": "sortedcontainers"}
_HIDING = """
import socket, sys
from importlib.machinery import PathFinder

class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {absent!r}:
            return None
        if top in {in_kit!r} and path is None:
            path = [entry for entry in sys.path if "site-packages" not in entry]
        return PathFinder.find_spec(name, path, target)

    find_distributions = staticmethod(PathFinder.find_distributions)
    invalidate_caches = staticmethod(PathFinder.invalidate_caches)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]

def refuse(self, address):
    raise OSError("this machine has no network")

socket.socket.connect = refuse
"""


def bare_environment(folder: Path, cache: Path) -> dict[str, str]:
    """Return the environment of a process on the bare machine; ``folder`` gets what makes it so."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_HIDING.format(absent=ABSENT, in_kit=tuple(IN_KIT)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EMOE_", "PIP_", "PYTEST_"))}
    return {**kept, "PYTHONPATH": str(folder), "EMOE_CACHE": str(cache)}


def kit_of(folder: Path, distributions: Sequence[str] = tuple(IN_KIT.values())) -> Path:
    """Write wheels of installed distributions (plain Python) into a folder, and return it."""
    folder.mkdir()
    for name in distributions:
        found = importlib.metadata.distribution(name)
        file = folder / f"{name.replace('-', '_')}-{found.version}-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as wheel:
            for path in found.files or ():
                if path.suffix != ".pyc" and ".." not in path.parts:
                    wheel.write(str(path.locate()), str(path))
    return folder
