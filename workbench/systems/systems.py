"""The systems that the bench compares, by name, and whether each can run on this machine.

`emoe` configurations and the policies of other systems share one engine, so that a difference between them is the
policy's and nothing else's; transformers, accelerate and llama.cpp run their own code. All run on the processor.

``NAME:no-limit`` runs a system without the memory limit; ``NAME[key=value;key=value]`` changes its options.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from emoe_core.errors import OptionError
from emoe_core.loader.eviction import DECAYED_DEMAND, LRU
from workbench.systems import llama_cpp

NO_LIMIT = ":no-limit"


@dataclass(frozen=True)
class System:
    """One system of a comparison.

    Attributes
    ----------
    name : str
        As the user wrote it.
    adapter : str
        "emoe", "stock", "accelerate" or "llama.cpp".
    options : dict
        Of the adapter; for "emoe" those of `emoe_core.load`.
    what : str
        What runs, for people.
    limited : bool
        Whether it runs under the bench's memory limit.
    resident : bool
        Whether it holds every expert.
    """

    name: str
    adapter: str
    options: dict[str, Any]
    what: str = ""
    limited: bool = True
    resident: bool = False

    @property
    def budgeted(self) -> bool:
        """Whether it takes the bench's expert budget."""
        return self.adapter == "emoe" and "budget" not in self.options

    @property
    def obstacle(self) -> str | None:
        """Why it cannot run on this machine, and what would help; None where it can."""
        return llama_cpp.EXTRA if self.adapter == "llama.cpp" and not llama_cpp.is_installed() else None


def _emoe(what: str, **options: Any) -> System:
    return System("", "emoe", {"predictor": None, "policy": LRU, **options}, what)


SYSTEMS: dict[str, System] = {
    "emoe": _emoe("the engine, exact (tolerance 0), on demand with LRU, the cache of mixtral-offloading"),
    "emoe-decayed": _emoe("emoe, keeping experts by decayed demand", policy=DECAYED_DEMAND),
    "emoe-lossy-0.1": _emoe("the engine at miss tolerance 0.1", tolerance=0.1),
    "emoe-lossy-1.0": _emoe("the engine at miss tolerance 1: absent experts are replaced, not loaded", tolerance=1.0),
    "emoe-resident": replace(_emoe("the engine with every expert resident", budget="100%"), resident=True),
    "activation-map": _emoe(
        "MoE-Infinity's activation map choosing residents, on our engine, taught the warm-up's routing",
        predictor="activation_map",
        interval=1,
    ),
    "stock-eager": System(
        "",
        "stock",
        {"experts_implementation": "eager"},
        "transformers, every expert resident, experts computed one by one",
        resident=True,
    ),
    "stock-grouped_mm": System(
        "",
        "stock",
        {"experts_implementation": "grouped_mm"},
        "transformers, every expert resident, its grouped products",
        resident=True,
    ),
    "accelerate": System(
        "", "accelerate", {}, "transformers with accelerate's disk offload for what the limit leaves no room for"
    ),
    "llama.cpp": System("", "llama.cpp", {}, "llama.cpp on a GGUF file of the same weights, memory-mapped"),
}
DEFAULT_SYSTEMS = (
    "emoe", "emoe-decayed", "emoe-lossy-0.1", "emoe-lossy-1.0", "activation-map",
    "stock-eager", "stock-eager:no-limit", "stock-grouped_mm:no-limit", "emoe-resident:no-limit",
    "accelerate", "llama.cpp", "llama.cpp:no-limit",
)  # fmt: skip


def find_systems(names: Sequence[str]) -> list[System]:
    """Return systems by name, in the given order.

    Raises
    ------
    OptionError
        When a name is unknown, given twice, or no name is given.
    """
    found = [find_system(name.strip()) for name in names if name.strip()]
    if not found:
        raise OptionError(f"no system was named: choose of {', '.join(SYSTEMS)}")
    twice = sorted({system.name for system in found if sum(other.name == system.name for other in found) > 1})
    if twice:
        raise OptionError(f"{', '.join(twice)} was named twice: name each system once")
    return found


def require_runnable(systems: Sequence[System]) -> None:
    """Raise OptionError, with what would help, where one of the systems cannot run on this machine."""
    for system in systems:
        if system.obstacle is not None:
            raise OptionError(f"{system.name} cannot run here: {system.obstacle}, or leave it out of --system")


def find_system(name: str) -> System:
    """Return one system by name, with its suffixes understood."""
    limited = not name.endswith(NO_LIMIT)
    plain, bracket, rest = name.removesuffix(NO_LIMIT).partition("[")
    if plain not in SYSTEMS or (bracket and not rest.endswith("]")):
        raise OptionError(
            f"unknown system {name!r}: choose of {', '.join(SYSTEMS)}, with '{NO_LIMIT}' behind it to run it without "
            f"the limit, or options, as in 'emoe[policy=lru;threads=4]'"
        )
    system = SYSTEMS[plain]
    return replace(system, name=name, limited=limited, options={**system.options, **_options(rest.rstrip("]"), name)})


def _options(text: str, name: str) -> dict[str, Any]:
    options = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"{name!r}: write options as key=value, with ';' between them")
        try:
            options[key.strip()] = json.loads(value)
        except ValueError:
            options[key.strip()] = value.strip()
    return options
