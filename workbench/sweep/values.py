"""What parameters of the bench's own notebooks mean, so that a value no run could use is refused before the first run.

A notebook of the bench that takes a model calls its parameters as `ExperimentConfig` calls its fields, or their plural
for a list with commas. Each value is judged alone, by the words that the run itself would be refused with; what only
shows together with others, with a model or on a machine is left to the run.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from emoe_core.errors import EmoeError, ExperimentError, did_you_mean
from workbench.models.names import require_model
from workbench.sweep.yaml_file import unquoted
from workbench.tracking.notebook import Parameter

SINGLE = (
    "budget",
    "tolerance",
    "on_miss",
    "strategy",
    "policy",
    "interval",
    "replan",
    "n_prompts",
    "mix",
    "source",
    "warm_prompts",
    "max_new_tokens",
    "answers",
    "labels",
    "label_error",
    "dtype",
    "expert_dtype",
    "device",
)
PLURAL = {
    "budgets": "budget",
    "arms": "arm",
    "intervals": "interval",
    "mixes": "mix",
    "expert_dtypes": "expert_dtype",
    "errors": "label_error",
}
ALIKE = {"timing_budget": "budget", "timing_dtype": "dtype"}


def require_named_model(name: str) -> None:
    """Raise `CheckpointError` when a model is none; a path from where the notebook runs is left to the run."""
    if "/" not in name or Path(name).is_absolute():
        require_model(name)


def check_value(known: dict[str, Parameter], name: str, value: Any) -> None:
    """Refuse a value that the bench has no meaning for.

    Parameters
    ----------
    known : dict
        The notebook's parameters; one that takes no `model` measures something of its own and is left alone.
    name : str
    value : object
        Of the right type already.

    Raises
    ------
    ExperimentError
    """
    if "model" not in known or value is None:
        return
    field = (ALIKE | PLURAL).get(name, name)
    try:
        if field == "model":
            require_named_model(value)
        if field in (*SINGLE, "arm"):
            from workbench.quality.configuration import ExperimentConfig, arm  # slow: it imports torch

            for part in [entry.strip() for entry in str(value).split(",")] if name in PLURAL else [value]:
                setting: dict[str, Any] = {field: number(part) if field in ("interval", "label_error") else part}
                arm(ExperimentConfig(), part) if field == "arm" else ExperimentConfig(**setting)
    except EmoeError as error:
        raise ExperimentError(f"parameter {name!r}: {error}") from None


def number(value: Any) -> Any:
    """Return the number that an entry of a list stands for, where it stands for one."""
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def check_parameter(notebook: Path, known: dict[str, Parameter], name: str, value: Any) -> None:
    """Refuse a parameter that the notebook does not have, or a value of another type than annotated or defaulted."""
    if name not in known:
        meant, listing = did_you_mean(get_close_matches(name, known, n=1)), ", ".join(sorted(known))
        raise ExperimentError(f"{notebook.name} has no parameter {name!r}.{meant} Known parameters: {listing}.")
    allowed = known[name].type_names()
    if not allowed:
        return
    if _takes(allowed, value):
        return
    hint = ""
    if isinstance(value, str) and _takes(allowed, unquoted(value)):
        hint = "; write it without quotes"
    elif "str" in allowed and isinstance(value, bool | int | float):
        hint = "; to give it as a text, write it in quotes"
    raise ExperimentError(
        f"{notebook.name}: parameter {name!r} is {value!r} ({_type_name(value)}), but takes "
        f"{' or '.join(sorted(allowed))} (default {known[name].default}){hint}."
    )


def _takes(allowed: set[str], value: Any) -> bool:
    given = _type_name(value)
    return given in allowed or (given == "int" and "float" in allowed)


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__
