"""What a checkpoint's generation_config demands of every answer, offline and served alike.

Two kinds of settings: those that change logits before a token is chosen (``repetition_penalty``, ``suppress_tokens``,
...), which transformers' own `generate` turns into logits processors, and those that choose otherwise than token by
token (beams, drafts, stop criteria), which are refused by name. How a request draws is its own: ``do_sample``,
``temperature``, ``top_k``, ``top_p`` and their like in a generation_config are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from emoe_core.errors import OptionError

if TYPE_CHECKING:
    from emoe_core.engine import Engine

# Settings of a generation_config that are not served, and the values that ask for nothing.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "use_mtp": (None, False),
    "speculation_type": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "is_assistant": (None, False),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "stop_strings": (None, []),
    "max_time": (None,),
    "cache_implementation": (None, "dynamic", "hybrid", "static", "offloaded", "offloaded_static"),
}


def require_served(engine: Engine) -> None:
    """Raise `OptionError` when the generation_config asks for a search, draft or stop that is not served."""
    config = engine.model.generation_config
    found = {name: getattr(config, name, None) for name in _NOT_SERVED}
    asked = [f"{name}={value}" for name, value in found.items() if value not in _NOT_SERVED[name]]
    if asked:
        raise OptionError(
            f"the generation_config of {engine.index.path} sets {', '.join(asked)}, which is not served: remove it "
            f"from its generation_config.json"
        )


def end_tokens(engine: Engine, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """Return the token ids that end an answer: the generation config's, else the tokenizer's."""
    config = engine.model.generation_config
    declared = getattr(config, "eos_token_id", None) if config is not None else None
    if declared is None and tokenizer is not None:
        declared = tokenizer.eos_token_id
    ends = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    if not all(isinstance(token, int) for token in ends):
        raise OptionError(
            f"eos_token_id in the generation_config of {engine.index.path} is {declared!r}: give token ids"
        )
    return set(ends)


def embedded_tokens(engine: Engine) -> int:
    """Return how many token ids the model has an embedding of; its tokenizer may know more, or fewer."""
    embeddings: Any = engine.model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def require_known_tokens(engine: Engine, ids: Sequence[int]) -> None:
    """Raise `OptionError` for token ids that the model has no embedding of."""
    known = embedded_tokens(engine)
    unknown = next((token for token in ids if not 0 <= token < known), None)
    if unknown is not None:
        raise OptionError(unknown_token(unknown, known, engine.tokenizer))


def unknown_token(token: int, known: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return what to say of a token id without an embedding."""
    text = "" if tokenizer is None or not 0 <= token < len(tokenizer) else f" ({tokenizer.decode([token])!r})"
    return f"token id {token}{text} is not one of the model's: its embeddings are 0 to {known - 1}. Leave it out."


class GenerationRules:
    """The rules of one engine's generation_config, as logits processors.

    Raises
    ------
    OptionError
        When a setting is not served, or is not one that transformers takes.
    """

    def __init__(self, engine: Engine) -> None:
        require_served(engine)
        self._engine = engine
        self._ends = sorted(end_tokens(engine, engine.tokenizer))
        self.processors([0], 1)

    def processors(
        self, prompt_ids: Sequence[int], max_new_tokens: int, changes: Mapping[str, Any] | None = None
    ) -> LogitsProcessorList:
        """Return the processors of one request, on the CPU; empty where nothing is asked for.

        Parameters
        ----------
        prompt_ids : sequence of int
        max_new_tokens : int
        changes : mapping, optional
            Settings of the generation_config that the request brings itself.

        Raises
        ------
        OptionError
            When transformers refuses a setting.
        """
        model: Any = self._engine.model
        ids = torch.tensor([prompt_ids], dtype=torch.long)
        try:
            # As `generate` does it, step by step. Normalised logits have the same order and the same softmax.
            config, _ = model._prepare_generation_config(
                None,
                **(changes or {}),
                do_sample=False,
                renormalize_logits=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=self._ends or None,
            )
            model._prepare_special_tokens(config, True, device="cpu", batch_size=1)
            config = model._prepare_generated_length(config, True, True, "input_ids", ids.shape[1], ids)
            processors: LogitsProcessorList = model._get_logits_processor(
                config, input_ids_seq_length=ids.shape[1], encoder_input_ids=ids, device="cpu"
            )
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"transformers refuses a setting of the generation_config of {self._engine.index.path}: {error}"
            ) from error
        return processors
