"""What a server must know of its model to read requests and write answers, without the model itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from emoe_core.engine import Engine
from emoe_core.errors import OptionError
from emoe_core.serving.generation_rules import embedded_tokens, end_tokens


@dataclass(frozen=True)
class ServedModel:
    """A model as its clients see it; it can be sent to another process.

    Attributes
    ----------
    name : str
        What clients ask for.
    tokenizer : PreTrainedTokenizerBase
    vocabulary : int
        Token ids lie below; the tokenizer may know more, or fewer.
    context_tokens : float
        Longest prompt and answer together; infinite where the model does not say.
    reroutable : bool
        Whether a request may bring a tolerance.
    ends : frozenset of int
        Tokens that end an answer.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    context_tokens: float
    reroutable: bool
    ends: frozenset[int]


def served_model(engine: Engine, name: str) -> ServedModel:
    """Return what there is to know of an engine's model.

    Raises
    ------
    OptionError
        When it has no tokenizer.
    """
    if engine.tokenizer is None:
        raise OptionError(f"{engine.index.path} has no tokenizer: save one beside the weights")
    config = engine.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    ends = frozenset(end_tokens(engine, engine.tokenizer))
    return ServedModel(name, engine.tokenizer, embedded_tokens(engine), context, engine.reroutable, ends)
