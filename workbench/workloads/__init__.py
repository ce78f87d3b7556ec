"""Task prompts: six task types, prepared once, and streams that mix them.

`prepare` fetches and stores, `load_task` reads one split, `load_fixture` gives twenty prompts of our own without any
download, `prompt_stream` orders prompts into a workload. The items are for evaluation and for profiling routing;
language-model weights are never fitted on them (see ``data/CARD.md``).
"""

from workbench.workloads.describe import describe, summary_tables
from workbench.workloads.fixture import load_fixture
from workbench.workloads.split import SPLITS
from workbench.workloads.store import data_hash, is_prepared, load_task, prepare
from workbench.workloads.stream import Prompt, StreamConfig, prompt_stream, prompts_hash, topic_order

__all__ = [
    "SPLITS",
    "Prompt",
    "StreamConfig",
    "data_hash",
    "describe",
    "is_prepared",
    "load_fixture",
    "load_task",
    "prepare",
    "prompt_stream",
    "prompts_hash",
    "summary_tables",
    "topic_order",
]
