"""Every predictor on the same recorded routing, as tables: what each covers, and how well it names the next experts."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from emoe_core.errors import OptionError
from workbench.predictors.training import TrainingOptions
from workbench.replay.prediction import compare, factories, next_element_scores
from workbench.replay.predictor_training import predictor_path, train_predictor
from workbench.replay.recording import Progress, RecordingConfig, record
from workbench.tracking.findings import Findings

LEARNED = ("none", "stored", "train")
VARIANTS = ("A", "L")
EPOCHS = 120


def compare_predictors(
    config: RecordingConfig,
    *,
    slots: int,
    intervals: Sequence[int],
    replan: str = "admission",
    learned: str = "none",
    cold: bool = False,
    progress: Progress,
) -> Findings:
    """Record a model's streams and replay all predictors on them.

    Parameters
    ----------
    config : RecordingConfig
    slots : int
        Experts that each layer may hold.
    intervals : sequence of int
    replan : str
        As in `emoe_core.EngineConfig`.
    learned : str
        Trained predictors: "none", "stored" (those in the cache) or "train" (now, on the warm-up, and kept).
    cold : bool
        Start without the warm-up's history; what a trained predictor learned stays in its weights.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Findings
        ``predictors`` (`prediction.compare`) and ``next_element`` (a row a predictor and stream, with
        `prediction.next_element_scores`).
    """
    if learned not in LEARNED:
        raise OptionError(f"unknown learned={learned!r}: choose one of {', '.join(LEARNED)}")
    recording = record(config, progress)
    paths = {name: predictor_path(recording.model_hash, name) for name in VARIANTS if learned != "none"}
    if learned == "train":
        for name, path in paths.items():
            options = TrainingOptions(variant=name, epochs=EPOCHS, seed=config.seed)
            train_predictor(recording, options).save(path)
    made = factories(*recording.shape, config.seed, paths)
    warm = () if cold else recording.warm
    replayed = compare(
        made,
        recording.streams,
        slots=[slots],
        intervals=intervals,
        warm=warm,
        replan=replan,
        expert_bytes=recording.expert_bytes,
        progress=lambda done, total: progress("replays", done, total),
    )
    scores = [
        {"predictor": name, "mix": mix, **next_element_scores(make(), stream, top_k=recording.top_k, warm=warm)}
        for mix, stream in recording.streams.items()
        for name, make in made.items()
    ]
    identity = {
        "model_hash": recording.model_hash,
        "data_hash": recording.data_hash,
        "dtype": config.dtype,
        "seed": config.seed,
    }
    return Findings({"predictors": replayed, "next_element": pd.DataFrame(scores)}, identity, config.n_prompts)
