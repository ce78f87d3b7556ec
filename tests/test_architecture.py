"""What import-linter does not see: notebooks, which stand on the bench, and on which nothing stands.

The rooms of both packages, their order and the absence of circles are contracts in pyproject.toml.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks" / "source").glob("*.py"))
PACKAGES = [path for package in ("emoe_core", "workbench") for path in sorted((ROOT / package).rglob("*.py"))]
MOST_FILES = {"emoe_core": 12, "workbench": 5}


def imported(path: Path) -> list[tuple[str, str]]:
    """Return every (module, name) that a file imports; the name is empty for a module as a whole."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [("." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stands_on_the_bench_alone(path: Path) -> None:
    """A notebook imports no other notebook and no test, and nothing that its module keeps for itself."""
    neighbours = {file.stem for folder in ("notebooks", "tests") for file in (ROOT / folder).rglob("*.py")}
    for module, name in imported(path):
        assert not module.startswith("."), module
        assert module.split(".")[0] not in neighbours, module
        assert not any(part.startswith("_") and part != "__future__" for part in (*module.split("."), name)), name


def test_nothing_stands_on_notebooks_or_tests() -> None:
    forbidden = {"notebooks", "tests", "conftest"}
    offenders = [
        (str(path.relative_to(ROOT)), module)
        for path in PACKAGES
        for module, _ in imported(path)
        if module.split(".")[0] in forbidden or module.startswith(".")
    ]
    assert offenders == []


@pytest.mark.parametrize("package", MOST_FILES)
def test_a_root_shows_its_rooms(package: str) -> None:
    assert len(list((ROOT / package).glob("*.py"))) <= MOST_FILES[package]


def test_every_room_has_its_place_in_the_order() -> None:
    """Both packages are contracts in which a room that nobody placed is an error."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    placed = {name: contract for contract in contracts for name in contract.get("containers", [])}
    assert set(placed) == set(MOST_FILES)
    assert all(contract["exhaustive"] for contract in placed.values())
