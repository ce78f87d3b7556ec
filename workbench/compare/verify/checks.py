"""Whether machine, model and data are those that a run recorded, as far as that can be told before it is executed.

The model is compared by content hash, and refused when it changed: every metric would differ for a known reason. Data
can be compared beforehand for runs that recorded a whole `ExperimentConfig`; for others the notebook says it when it
has run. Everything that the notebook's own process records is compared again afterwards.
"""

from __future__ import annotations

from typing import Any

from emoe_core.errors import EmoeError, ExperimentError
from workbench.compare.differences import Difference, environment_differences
from workbench.compare.verify.plan import Plan
from workbench.machine.environment import IDENTITY, describe_environment
from workbench.tracking.record import RunRecord

# Known only inside the notebook's process.
WITHIN = (*IDENTITY, "determinism", "executable")


def machine_differences(run: RunRecord, plan: Plan) -> list[Difference]:
    """Return what of this machine and installation is not as recorded."""
    if not run.environment:
        return [Difference("environment", "not recorded", "", (), "what the run ran on is not known")]
    now = describe_environment().to_dict() | ({} if plan.threads is None else {"threads": plan.threads})
    recorded, here = ({n: v for n, v in kind.items() if n not in WITHIN} for kind in (run.environment, now))
    return environment_differences(recorded, here)


def check_model(run: RunRecord, plan: Plan) -> str:
    """Return a sentence on the model's content hash.

    Raises
    ------
    ExperimentError
        When the model is not the recorded one, or cannot be opened.
    """
    recorded = run.environment.get("model_hash")
    name = plan.parameters.get("model", run.params.get("model"))
    if recorded is None or name is None:
        return "model: the notebook says which one, compared afterwards"
    from emoe_core.checkpoint.index import open_checkpoint
    from workbench.models.names import resolve_model

    try:
        found = open_checkpoint(resolve_model(str(name))).source_hash
    except EmoeError as error:
        raise ExperimentError(f"the model {name!r} of {run.describe()} cannot be opened: {error}") from None
    if found != recorded:
        raise ExperimentError(
            f"the model {name!r} is not the one that {run.describe()} ran: its content hash is {found[:12]}, recorded "
            f"was {recorded[:12]}. Restore that checkpoint (an embedded model: check out commit "
            f"{str(run.environment.get('commit'))[:10]} and `emoe model build`), or give --anyway to run this one."
        )
    return f"model {name}: content hash {found[:12]}, as recorded"


def check_data(run: RunRecord) -> tuple[str, Difference | None]:
    """Return a sentence on the data's hash, and the difference if there is one."""
    recorded = run.environment.get("data_hash")
    config = None if recorded is None else _stream_config(run.params)
    if config is None:
        return "data: the notebook says which, compared afterwards", None
    from workbench.workloads import prompt_stream, prompts_hash

    try:
        found = prompts_hash(prompt_stream(config))
    except EmoeError as error:
        raise ExperimentError(f"the prompts of {run.describe()} cannot be read: {error}") from None
    if found == recorded:
        return f"data: {config.n_prompts} prompts of {config.source}, hash {found[:12]}, as recorded", None
    return "data: other prompts than recorded", Difference("data", str(recorded)[:12], found[:12])


def _stream_config(params: dict[str, Any]) -> Any:
    """Return the stream of a run whose parameters are a whole `ExperimentConfig`, else None."""
    from workbench.quality.configuration import config_of

    config = config_of(params)
    return None if config is None else config.stream()
