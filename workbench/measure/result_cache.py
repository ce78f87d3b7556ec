"""Results of measured processes that are kept: a file each, named by everything that the result depends on.

That is the question, Python, the libraries that compute, and our own code: the whole engine, and the rooms whose
modules run in a measured process or start one. Where any of it changes, the result is measured anew, silently.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import emoe_core
from emoe_core.loader.cache_folder import cache_dir

LIBRARIES = ("torch", "transformers", "safetensors")
CODE = (
    Path(emoe_core.__file__).parent,
    *(Path(__file__).parents[1] / room for room in ("measure", "machine", "systems")),
)


def result_file(kind: str, question: dict[str, Any]) -> Path:
    """Return where the answer to a question (JSON values) is, or is to be, kept.

    Parameters
    ----------
    kind : str
        Folder of the cache: "controls", "limit-trials".
    question : dict
    """
    content = json.dumps([question, _code_digest()], sort_keys=True)
    return cache_dir() / kind / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"


@cache
def _code_digest() -> str:
    digest = hashlib.sha256(" ".join([sys.version, *map(version, LIBRARIES)]).encode())
    for folder in CODE:
        for source in sorted(folder.rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()
