"""Coverage-guided fuzzing of one reader of foreign bytes, with atheris (see README.md beside this file).

    python tests/fuzz/fuzz_reader.py NAME [CORPUS_DIR] [-max_total_time=120 and other options of libFuzzer]

NAME is a reader of `tests/foreign_readers.py`. What the fuzzer makes is taken as the reader's text (a header, or the
whole file) and wrapped so that lengths and checksums fit. One of our own errors is fine; whatever else is raised stops
the fuzzer and leaves the input in a file ``crash-...``.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["emoe_core", "workbench"]):
    from foreign_readers import READERS

    from emoe_core.errors import EmoeError


def main() -> None:
    """Fuzz the named reader until libFuzzer stops."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"name a reader: {', '.join(READERS)}")
    reader = READERS[sys.argv.pop(1)]
    with TemporaryDirectory() as folder, TemporaryDirectory() as seeds:
        path = Path(folder) / reader.file
        (Path(seeds) / "sample").write_bytes(reader.text())

        def one(content: bytes) -> None:
            path.write_bytes(reader.wrap(content))
            with suppress(EmoeError):
                reader.read(path)

        atheris.Setup([*sys.argv, "-rss_limit_mb=4000", "-timeout=10", seeds], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
