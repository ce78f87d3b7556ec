"""Results of measured processes that are kept: a file each, named by everything that the result depends on.

That is the question, Python, the libraries that compute, and our own code: the whole engine, and the rooms whose
modules run in a measured process or start one. Where any of it changes, the result is measured anew, silently.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from emoe_core.loader.cache_folder import cache_dir
from workbench.machine.environment import PROJECT, code_hash, installed_versions

LIBRARIES = ("torch", "transformers", "safetensors")
CODE = [PROJECT / folder for folder in ("emoe_core", "workbench/measure", "workbench/machine", "workbench/systems")]


def result_file(kind: str, question: dict[str, Any]) -> Path:
    """Return where the answer to a question (JSON values) is, or is to be, kept.

    Parameters
    ----------
    kind : str
        Folder of the cache: "controls", "limit-trials".
    question : dict
    """
    content = json.dumps([question, *_answered_by()], sort_keys=True)
    return cache_dir() / kind / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"


@cache
def _answered_by() -> list[Any]:
    return [sys.version, installed_versions(LIBRARIES), code_hash(CODE)]
