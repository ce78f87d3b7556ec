"""What a notebook draws: tables that it has just measured, or those that were recorded at full settings.

A recorded result is one Parquet file, ``results/NOTEBOOK.parquet``. Its column ``table`` says whose row a row is; the
others are called TABLE.COLUMN and are empty in rows of other tables. What was measured is in the file's metadata.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from emoe_core.errors import ExperimentError
from workbench.progress import stage_bars
from workbench.tracking import run as tracking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[2] / "results"
METADATA = b"emoe"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Findings:
    """Tables, and what they were measured on.

    Attributes
    ----------
    tables : mapping of str to DataFrame
        By the name under which they are logged; empty ones are left out.
    identity : mapping of str to scalar
        Model hash, data hash, dtype, seed, ...
    prompts : int
        Prompts of each stream (or requests) that the tables rest on: what a figure calls n.
    recorded : bool
        Whether they were read from a file.
    """

    tables: Mapping[str, pd.DataFrame]
    identity: Mapping[str, Any] = field(default_factory=dict)
    prompts: int = 0
    recorded: bool = False

    def __getitem__(self, name: str) -> pd.DataFrame:
        return self.tables[name]

    def get(self, name: str) -> pd.DataFrame | None:
        """Return a table, None where there was nothing to put in it."""
        return self.tables.get(name)

    def log(
        self,
        experiment: str,
        name: str,
        parameters: Mapping[str, Any],
        metrics: Mapping[str, float | None],
        tables: Mapping[str, pd.DataFrame] | None = None,
        figures: Mapping[str, Figure] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> str:
        """Log everything as one run (`tracking.run`) and return what became of it; what was recorded is logged already.

        Parameters
        ----------
        experiment, name : str
        parameters, metrics, tags : mapping
        tables, figures : mapping, optional
            What was made of the findings, beside their own tables.
        """
        if self.recorded:
            return f"not logged: this result was recorded ({self.provenance})"
        with tracking.run(experiment, name, params=parameters, tags=tags, **self.identity) as run:
            run.log_metrics(metrics)
            for title, table in {**self.tables, **(tables or {})}.items():
                run.log_frame(title, table)
            for title, figure in (figures or {}).items():
                run.log_figure(title, figure)
        return "logged"

    @property
    def provenance(self) -> str:
        """What was measured, in one line."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.identity.items())


def findings(notebook: str, measure: bool, measuring: Callable[[Progress], Findings]) -> Findings:
    """Return a notebook's recorded result, or what ``measuring`` finds where it is to be measured.

    That is where ``measure`` says so, where nothing is recorded, and in a sweep, whose run must be its own.

    Parameters
    ----------
    notebook : str
        The notebook's file name without extension.
    measure : bool
    measuring : callable
        Takes a callback (stage, done, total), which draws bars.
    """
    file = RESULTS / f"{notebook}.parquet"
    if not measure and tracking.RUN_VARIABLE not in os.environ and file.is_file():
        return read_findings(file)
    if not measure and tracking.RUN_VARIABLE not in os.environ:
        print(f"No recorded result of {notebook} is at hand ({file}): it is measured.", file=sys.stderr)
    with stage_bars() as progress:
        return measuring(progress)


def write_findings(file: Path, found: Findings) -> Path:
    """Write a result that is to be drawn later, with its folder, and return the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for name, table in found.tables.items():
        part = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata()
        part = part.rename_columns([f"{name}.{column}" for column in table])
        parts.append(part.append_column("table", pa.array([name] * len(part))))
    whole = pa.concat_tables(parts, promote_options="default")
    file.parent.mkdir(parents=True, exist_ok=True)
    said = {"identity": dict(found.identity), "prompts": found.prompts}
    pq.write_table(whole.replace_schema_metadata({METADATA: json.dumps(said)}), file)
    return file


def read_findings(file: Path) -> Findings:
    """Return a recorded result.

    Raises
    ------
    ExperimentError
        When the file is not one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        whole = pq.read_table(file)
        said = json.loads((whole.schema.metadata or {})[METADATA])
        tables = {}
        for name in dict.fromkeys(whole["table"].to_pylist()):
            own = [column for column in whole.column_names if column.startswith(f"{name}.")]
            part = whole.filter(pc.equal(whole["table"], name)).select(own)
            tables[name] = part.rename_columns([column.removeprefix(f"{name}.") for column in own]).to_pandas()
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise ExperimentError(
            f"{file} holds no recorded result: {error!r:.200}. Set measure=True to measure it anew."
        ) from None
    return Findings(tables, said["identity"], said["prompts"], recorded=True)
