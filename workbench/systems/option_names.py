"""Options of the engine as the bench names them: its own predictors and eviction rules stand beside the engine's.

Configurations, sweeps and jobs in processes of their own carry names. Where an engine is loaded, what they name is put
in their place::

    emoe_core.load(checkpoint, **resolve_options(config.engine_options()))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emoe_core.errors import require_known
from emoe_core.loader.eviction import POLICY_NAMES
from emoe_core.predictor import HALF_LIVES, NO_PREDICTOR, TRAINED
from workbench.predictors import PREDICTORS
from workbench.systems.eviction_rules import RULES


def resolve_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of `emoe_core.load`, with predictors and rules in place of names that only the bench knows.

    Raises
    ------
    OptionError
        For a name that nobody knows; the message lists the known ones.
    """
    resolved = dict(options)
    name = options.get("predictor")
    if isinstance(name, str):
        require_known(name, sorted((*PREDICTORS, TRAINED, NO_PREDICTOR)), "predictor")
        if name not in HALF_LIVES:
            resolved["predictor"] = PREDICTORS.get(name, name)
    policy = options.get("policy")
    if isinstance(policy, str):
        require_known(policy, sorted((*POLICY_NAMES, *RULES)), "eviction policy")
        resolved["policy"] = RULES.get(policy, policy)
    return resolved
