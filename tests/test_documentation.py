"""Promises of the documentation: every Python block runs, every command is one, the site builds without a warning."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.planning.tasks import Profile, TaskProfile
from workbench.cli import app, main
from workbench.models.reference.tiny import EXPERTS, LAYERS, tiny_moe
from workbench.quality.profile.profiling import profile_path
from workbench.sweep.file import read_sweep
from workbench.tracking.place import HOME_VARIABLE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Commands that answer in a second or two with a tiny model; others are only parsed, and so is what has these options.
QUICK = ("run ", "estimate ", "model pack ", "model families", "bench --list-systems", "cache list")
SLOW_OPTIONS = {"--check", "cuda"}
# What the pages call a model, and the tiny one that the tests put there.
MODELS = {
    "path/to/model": "mixtral",
    "PATH": "mixtral",
    "reference": "mixtral",
    "carved": "qwen2_moe",
    "native": "olmoe",
}


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a page."""

    language: str
    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page in order."""
    found = []
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block") and token.map is not None:
            info = token.info.strip()
            first = token.map[0] + (token.type == "fence")
            found.append(Block(info.split(" ")[0] if info else "", info, token.content, first))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """Return the arguments of each ``emoe`` command in a block of shell lines."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and words[0] in ("emoe", ".venv/bin/emoe"):
            yield words[1:]


def parse(arguments: list[str]) -> None:
    """Have the command line read the arguments, without doing anything."""
    command, rest = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"emoe has no command {' '.join(arguments)}"
        command = command.commands[rest.pop(0)]
    with contextlib.suppress(typer.Exit):  # of an option that answers by itself, such as --list-systems
        command.make_context("emoe", rest)


@pytest.fixture(scope="module")
def tiny(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models that pages name, their profiles, and what else lies in the project's."""
    folder = tmp_path_factory.mktemp("documentation")
    shutil.copytree(empty_store / "mlruns", folder / "mlruns")
    for name in ("notebooks", "sweeps"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOE_CACHE", str(folder / "cache"))
        for name, family in MODELS.items():
            checkpoint = tiny_moe(folder / name, family)
            model_hash = open_checkpoint(checkpoint).source_hash
            profile_of(model_hash).save(profile_path(model_hash))
    return folder


def profile_of(model_hash: str) -> Profile:
    """Return a task profile such as `emoe model profile` measures."""
    covered = (tuple(slots / EXPERTS for slots in range(EXPERTS + 1)),) * LAYERS
    task = TaskProfile("qa", (True,) * LAYERS, 8.0, layer_kl_nats=(0.01,) * LAYERS, coverage=covered, loss_scale=1.0)
    return Profile(model_hash, "none", LAYERS, {"qa": task})


@pytest.fixture
def reader(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sit where a reader sits: in a folder with models and notebooks, with a store and a cache of its own."""
    monkeypatch.chdir(tiny)
    monkeypatch.setenv("EMOE_CACHE", str(tiny / "cache"))
    monkeypatch.setenv(HOME_VARIABLE, str(tiny))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("workbench.models.names.EMBEDDED", {})  # 'reference' is then the folder of that name
    return tiny


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_works(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks run in order: Python in one namespace, commands parsed or run, titled files written."""
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        title = re.search(r'title="([^"]+)"', block.info)
        if title:
            Path(title[1]).write_text(block.text)
        if block.language == "python":
            # Blank lines before it make line numbers those of the page.
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
        elif block.language == "yaml" and "stages:" in block.text:
            file = Path(title[1]) if title else reader / "block.yaml"
            file.write_text(block.text)
            read_sweep(file)
        elif block.language in ("", "bash", "console"):
            for arguments in commands(block):
                parse(arguments)
                quick = " ".join(arguments).startswith(QUICK) or "--dry-run" in arguments
                if quick and not SLOW_OPTIONS.intersection(arguments):
                    run(arguments, monkeypatch)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in this process; any exit code but 0 fails."""
    monkeypatch.setattr(sys, "argv", ["emoe", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {".venv/.ready"}
    named = re.findall(r"`make ([^\s`]+)`|^ *make (\S+)", page.read_text(), re.MULTILINE)
    assert {first or second for first, second in named} <= known


class Fetched(HTMLParser):
    """What a browser would fetch to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get("href") if tag == "link" and given.get("rel") != "canonical" else given.get("src")
        if address:
            self.addresses.append(address)


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="needs the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    mkdocs.build(config)
    pages = list((tmp_path / "site").rglob("*.html"))
    assert (tmp_path / "site" / "reference" / "cli.html") in pages
    for page in pages:
        reader = Fetched()
        reader.feed(page.read_text())
        assert not [address for address in reader.addresses if "//" in address], page
    styles = "".join(file.read_text() for file in (tmp_path / "site").rglob("*.css"))
    assert not re.search(r"url\(['\"]?(https?:)?//", styles)
    commands_page = (tmp_path / "site" / "reference" / "cli.html").read_text()
    assert "--max-quality-loss" in commands_page
    assert "<math" in (tmp_path / "site" / "explanation" / "planning.html").read_text()
