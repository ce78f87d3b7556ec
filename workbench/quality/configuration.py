"""The frozen configuration of one run of the bench, and how a tracker records it.

A *strategy* says who decides which experts are resident: a predictor by name (predict, plan, swap; ``frequency`` is the
default, ``random`` the sanity bound, ``transformer`` the trained one), ``oracle`` (hindsight, the upper bound: knows
the routing of every prompt to come), or ``lru`` (on demand; what most systems do).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from emoe_core.config import EngineConfig
from emoe_core.errors import OptionError, require_known
from emoe_core.experts.rerouting import DROP, REROUTE
from emoe_core.planning.tasks import TASK_TYPES
from emoe_core.predictor import FREQUENCY, TRAINED
from workbench.predictors import PREDICTORS
from workbench.systems.option_names import resolve_options
from workbench.workloads import StreamConfig
from workbench.workloads.labels import check_labels

ORACLE = "oracle"
STRATEGIES = (*sorted(PREDICTORS), TRAINED, ORACLE, "lru")


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on, but the machine. See `emoe_core.EngineConfig` and `StreamConfig` for the fields.

    ``warm_prompts`` prompts of the profile split teach the predictor before the run; 0 is a cold start.
    ``skipping`` uses the model's task profile: insensitive (task, layer) pairs take whatever is resident.
    ``max_quality_loss`` is a target that the model's task profile turns into tolerances, and slots where ``budget`` is
    None; ``tolerance`` must then be 0.
    ``on_miss`` says what becomes of absent experts that the tolerance lets go: "reroute", or "drop", the control.
    ``stepwise`` scores token by token, so that experts are asked for as while generating; else one pass a prompt.
    ``labels`` and ``label_error`` say what the engine is told of each prompt's task type (`workloads/labels.py`).
    """

    model: str = "reference"
    budget: str | None = "60%"
    tolerance: float = 1.0
    on_miss: str = REROUTE
    cache_bias: float = 0.0
    strategy: str = "frequency"
    policy: str = "lru"
    interval: int = 40
    replan: str = "admission"
    skipping: bool = False
    max_quality_loss: float | None = None
    n_prompts: int = 24
    tasks: tuple[str, ...] = TASK_TYPES
    mix: str = "uniform"
    session_length: float = 8.0
    source: str = "embedded"
    split: str = "test"
    labels: str = "given"
    label_error: float = 0.0
    stepwise: bool = False
    warm_prompts: int = 24
    max_new_tokens: int = 32
    answers: int = 0
    dtype: str = "float32"
    expert_dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        require_known(self.strategy, STRATEGIES, "strategy")
        if self.warm_prompts < 0 or self.answers < 0 or self.max_new_tokens < 1:
            raise OptionError("warm_prompts and answers must be 0 or more, max_new_tokens 1 or more")
        if self.strategy == ORACLE and self.answers:
            raise OptionError("the oracle knows the scored prompts only: set answers to 0")
        check_labels(self.labels, self.label_error)
        self.stream()
        EngineConfig(**resolve_options(self.engine_options()))

    def stream(self, split: str | None = None, n_prompts: int | None = None) -> StreamConfig:
        """Return the prompt stream of this run, or one like it on another split."""
        return StreamConfig(
            self.tasks,
            n_prompts or self.n_prompts,
            self.mix,  # type: ignore[arg-type]
            self.session_length,
            self.seed,
            split or self.split,
            self.source,  # type: ignore[arg-type]
        )

    def engine_options(self) -> dict[str, Any]:
        """Return options for `resolve_options`, without the profile and the target that it is needed for."""
        return {
            "budget": self.budget,
            "tolerance": self.tolerance,
            "on_miss": self.on_miss,
            "cache_bias": self.cache_bias,
            # The oracle is no engine's: the experiment brings it.
            "predictor": None if self.strategy in ("lru", ORACLE) else self.strategy,
            "interval": self.interval,
            "replan": self.replan,
            "policy": self.policy,
            "device": self.device,
            "dtype": self.dtype,
            "expert_dtype": self.expert_dtype,
            "seed": self.seed,
        }


def arm(base: ExperimentConfig, name: str) -> ExperimentConfig:
    """Return the configuration of an arm of a comparison.

    Parameters
    ----------
    base : ExperimentConfig
        What all arms have in common.
    name : str
        A strategy, with absent experts given up as far as ``base`` tolerates; "lru" is on demand and exact; "drop" has
        the residents that `FREQUENCY` chooses and drops what is absent.
    """
    if name == DROP:
        return replace(base, strategy=FREQUENCY, on_miss=DROP)
    return replace(base, strategy=name, tolerance=0.0 if name == "lru" else base.tolerance)


def as_params(config: ExperimentConfig) -> dict[str, Any]:
    """Return the configuration as flat parameters for a tracker."""
    return {name: ",".join(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def config_of(params: Mapping[str, Any]) -> ExperimentConfig | None:
    """Return the configuration that `as_params` flattened, None where the parameters are not a whole one."""
    names = [item.name for item in fields(ExperimentConfig)]
    if any(name not in params for name in names):
        return None
    given = {name: params[name] for name in names}
    return ExperimentConfig(**given | {"tasks": tuple(str(given["tasks"]).split(","))})
