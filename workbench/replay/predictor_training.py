"""Train the transformer predictor of a model on its recorded warm-up, keep it in the cache, find it again."""

from __future__ import annotations

import shlex
from pathlib import Path

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import PredictorError
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.predictor.transformer import TransformerPredictor
from workbench.models.names import resolve_model
from workbench.predictors.training import Progress, TrainingOptions, train
from workbench.replay.recording import Recording

# The paper's largest predictor takes 1.3% of its model's memory; ours must not take more.
LARGEST_SHARE = 0.013


def predictor_path(model_hash: str, variant: str = "A") -> Path:
    """Return where the trained predictor of a model is kept."""
    return cache_dir() / "predictors" / f"{model_hash[:24]}-{variant}.safetensors"


def stored_predictor(model: str | Path, variant: str = "A") -> Path:
    """Return the file of a model's trained predictor.

    Parameters
    ----------
    model : str or Path
        As for `resolve_model`; errors name it so.
    variant : str

    Raises
    ------
    PredictorError
        When there is none; the message says how to train it.
    """
    path = predictor_path(open_checkpoint(resolve_model(model)).source_hash, variant)
    if not path.exists():
        raise PredictorError(
            f"{model} has no trained predictor yet: train one with `emoe predictor train {shlex.quote(str(model))}`"
        )
    return path


def train_predictor(
    recording: Recording, options: TrainingOptions | None = None, progress: Progress | None = None
) -> TransformerPredictor:
    """Train on a recording's warm-up.

    Raises
    ------
    PredictorError
        When the network is larger than 1.3% of the model's bytes.
    DataError
        When a task has too few prompts.
    """
    made = train([(use.task, use.counts) for use in recording.warm], recording.model_hash, options, progress)
    share = made.parameter_bytes / recording.model_bytes
    if share > LARGEST_SHARE:
        raise PredictorError(
            f"the predictor has {made.parameter_bytes:,} bytes, {share:.1%} of the model's, more than "
            f"{LARGEST_SHARE:.1%}: give a smaller width or depth"
        )
    return made
