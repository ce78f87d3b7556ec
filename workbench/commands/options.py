"""Arguments and options that several commands take, each said once.

Defaults stand in a command's signature; None means what the help says after "if not given". The choices of a `Literal`
are those of the code's own tables (a test compares them), which are not imported: ``emoe --help`` loads nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

MEMORY_PANEL = "Memory and exactness"
LIMITS_PANEL = "Limits"

Model = Annotated[
    str,
    typer.Argument(
        help="Folder of a Hugging Face checkpoint, a hub id, or a model that comes along: 'reference', 'carved', "
        "'native' or 'tiny' (made if missing)."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Memory for experts: '40%', '300MB' or '3 slots'; 40%, or as the target asks, if not given.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
MaxQualityLoss = Annotated[
    float | None,
    typer.Option(
        help="Allowed rise of perplexity, 0.01 for 1%; needs the model's task profile (`emoe model profile`).",
        rich_help_panel=MEMORY_PANEL,
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(help="0 is exact; 1 loads only while slots are empty, then replaces.", rich_help_panel=MEMORY_PANEL),
]
OnMiss = Annotated[
    Literal["reroute", "drop"],
    typer.Option(
        help="What becomes of absent experts that the tolerance lets go: residents take their tokens, or nobody does.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
PredictorName = Annotated[
    Literal["frequency", "recent"],
    typer.Option(
        help="What residents are guessed by: a task's last twenty requests or so, or its last two, for ones that drift "
        "(`emoe predictor evaluate` tells).",
        rich_help_panel=MEMORY_PANEL,
    ),
]
Device = Annotated[str, typer.Option(help="'auto', 'cpu' or 'cuda'.", rich_help_panel=MEMORY_PANEL)]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the weights; 'auto' is the checkpoint's.", rich_help_panel=MEMORY_PANEL),
]
ExpertDtype = Annotated[
    Literal["auto", "int8"],
    typer.Option(
        help="'auto' keeps experts as they are; 'int8' rounds them: half the memory, not exact.",
        rich_help_panel=MEMORY_PANEL,
    ),
]

SchedulerName = Annotated[
    Literal["fcfs", "edf", "shortest", "affine", "emoe", "emoe_no_loading"],
    typer.Option(help="Who is next; shortest, emoe and emoe_no_loading go by costs (`emoe model costs`)."),
]
MaxBatch = Annotated[int, typer.Option(help="Requests that run at once in an engine.", rich_help_panel=LIMITS_PANEL)]
KvTokens = Annotated[
    int,
    typer.Option(
        help="Tokens of KV cache of an engine: prompts and answers of all that run.", rich_help_panel=LIMITS_PANEL
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster, HOST:PORT or ray://HOST:PORT; the one that this machine is part of if not given."),
]

TaskType = Literal["qa", "summarization", "classification", "comparison", "conversation", "code"]
RouterName = Literal["round_robin", "least_loaded", "affinity"]
Source = Annotated[
    Literal["embedded", "fixture", "hub"],
    typer.Option(help="Prompts: of packages, the 20 that come along, or data sets of the hub."),
]
AnswerTokens = Annotated[int, typer.Option("--max-new-tokens", help="Tokens of each recorded answer.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
OutFile = Annotated[Path | None, typer.Option(help="File to write; in the cache if not given.")]
OutFolder = Annotated[Path | None, typer.Option(help="Folder to write; in the cache if not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
