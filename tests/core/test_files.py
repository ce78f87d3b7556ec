"""Our own files are whole or not there, and reading a foreign one takes bounded memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emoe_core.files import MAX_BYTES, parse, read_text, whole_folder, write_whole
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.planning.tasks import Profile, ProfileError


def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "folder" / "file.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new " * 100_000 + "\ud800")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "made" / "folder"
    with whole_folder(path) as scratch:
        (scratch / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as scratch:
        (scratch / "half").touch()
        raise KeyboardInterrupt
    assert [file.name for file in path.iterdir()] == ["old"]
    with whole_folder(path) as scratch:
        (scratch / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"] and list(path.parent.iterdir()) == [path]


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.touch()
    os.truncate(path, MAX_BYTES + 1)  # a hole: no byte is on the disk
    with pytest.raises(ValueError, match="at most 67,108,864"):
        read_text(path)
    with pytest.raises(ProfileError, match="at most 67,108,864"):
        Profile.load(path)


def test_what_is_nested_too_deep_is_no_crash() -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        parse("[" * 1_000_000)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"EMOE_CACHE": "chosen", "XDG_CACHE_HOME": "general"}, "chosen"),
        ({"XDG_CACHE_HOME": "general"}, "general/emoe"),
        ({"HOME": "home"}, "home/.cache/emoe"),
    ],
)
def test_the_cache_lies_where_the_most_particular_variable_says(
    variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EMOE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    assert cache_dir() == tmp_path / expected
    assert cache_dir().is_dir()
