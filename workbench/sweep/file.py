"""Read a sweep file: YAML whose mistakes are told with their line. What it may say is in `sweep_schema`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from emoe_core.errors import ExperimentError, did_you_mean
from workbench.sweep.schema import Needs, NeedsWhere, Scalar, Stage, SweepFile
from workbench.sweep.yaml_file import read_yaml


@dataclass(frozen=True)
class Source:
    """A sweep file's text as a tree of nodes that know their lines."""

    path: Path
    root: yaml.Node | None

    def written(self, keys: Sequence[str | int]) -> Sequence[str | int]:
        """Return keys as the file has them: it may write its only stage beside the name."""
        single = isinstance(self.root, yaml.MappingNode) and "stages" not in entries(self.root)
        return keys[2:] if single and tuple(keys[:2]) == ("stages", 0) else keys

    def place(self, *keys: str | int) -> str:
        """Return ``FILE:LINE`` of the entry that the keys lead to, or of the closest entry above it."""
        line, node = 1, self.root
        for key in self.written(keys):
            found = entries(node).get(key)
            if found is None:
                continue  # a name that pydantic puts in
            line, node = found
        return f"{self.path}:{line}"

    def repeated_keys(self) -> Iterator[tuple[str, int]]:
        """Yield every key that its mapping holds twice, with the line of the second."""
        waiting: list[yaml.Node] = [self.root] if self.root else []
        while waiting:
            node = waiting.pop()
            if isinstance(node, yaml.MappingNode):
                seen: set[str] = set()
                for key, value in node.value:
                    if key.value in seen:
                        yield str(key.value), key.start_mark.line + 1
                    seen.add(key.value)
                    waiting.append(value)
            elif isinstance(node, yaml.SequenceNode):
                waiting.extend(node.value)


def entries(node: yaml.Node | None) -> dict[str | int, tuple[int, yaml.Node]]:
    """Return the entries of a mapping by key, or of a list by place, each with its line and node."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: (key.start_mark.line + 1, value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return {place: (item.start_mark.line + 1, item) for place, item in enumerate(node.value)}
    return {}


@dataclass(frozen=True)
class SweepSource:
    """A valid sweep file, and where its entries stand in the text."""

    file: SweepFile
    source: Source


def read_sweep(path: Path, given: Mapping[str, Scalar] | None = None) -> SweepSource:
    """Read and validate a sweep file.

    Parameters
    ----------
    path : Path
    given : mapping of str to scalar, optional
        Values in place of those that stages fix. The sweep is then called ``NAME-VALUE``, so that runs of one file with
        several models lie side by side.

    Raises
    ------
    ExperimentError
        When the file is missing, is not YAML, or says something that a sweep does not know, each mistake with its line;
        or when no stage fixes what is given.
    """
    if not path.is_file():
        raise ExperimentError(f"no sweep file at {path}. Sweeps lie in sweeps/, for example sweeps/quick.yaml.")
    content = read_yaml(path)
    if not isinstance(content, dict):
        what = "it is empty" if content is None else "it holds no keys"
        raise ExperimentError(f"{path} is not a usable sweep file: {what}. Give at least name, notebook and kind.")
    source = Source(path, yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
    for key, line in source.repeated_keys():
        raise ExperimentError(f"{path}:{line}: the key {key!r} stands twice; YAML would drop the first.")
    try:
        file = SweepFile.model_validate(content)
        return SweepSource(file.with_fixed(given) if given else file, source)
    except ValidationError as error:
        told = [describe(problem, source) for problem in error.errors()]
        raise ExperimentError("\n".join([f"{path} is not a usable sweep file:", *told])) from None


KEYS = tuple({name for part in (SweepFile, Stage, Needs, NeedsWhere) for name in part.model_fields})
REPHRASED = {
    "extra_forbidden": "unknown key",
    "missing": "this key is missing",
    "string_pattern_mismatch": "use letters, digits, '.', '_' and '-', a letter or digit first",
    "list_type": "give a list of values, such as [a, b]",
}


def describe(problem: Any, source: Source) -> str:
    """Return one of pydantic's complaints as a line: place in the file, keys, and what is wrong."""
    keys = source.written(problem["loc"])
    what = REPHRASED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if problem["type"] == "extra_forbidden":
        what += ", searches are gone: write a grid" if keys[-1] == "search" else ""
        what += f".{did_you_mean(get_close_matches(str(keys[-1]), KEYS, n=1))}"
    return f"  {source.place(*problem['loc'])}: {'.'.join(str(key) for key in keys) or 'top level'}: {what}"
