"""The options of `emoe_core.load`, validated where they are made, and the device that a name stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from emoe_core.budget import Budget
from emoe_core.checkpoint.index import EXPERT_DTYPES, parse_dtype
from emoe_core.device import KINDS, Device
from emoe_core.errors import OptionError, require_known
from emoe_core.experts.rerouting import DROP, ON_MISS, REROUTE
from emoe_core.loader.eviction import LRU, require_policy
from emoe_core.loader.slots import Policy
from emoe_core.loader.storage import VERIFY
from emoe_core.planning.control import REPLANS
from emoe_core.planning.tasks import Profile
from emoe_core.predictor import FREQUENCY, PredictorFactory


@dataclass(frozen=True)
class EngineConfig:
    """All options of `load`, validated.

    Attributes
    ----------
    budget : str, int, float or None
        Expert memory: bytes ("300MB", 300000000), a share of expert bytes ("40%", 0.4) or "3 slots" per layer. None:
        all experts, or as few as ``max_quality_loss`` allows.
    tolerance : float
        Miss tolerance in [0, 1]: 0 is exact, 1 the paper's eMoE.
    on_miss : str
        What becomes of absent experts that the tolerance lets go: "reroute" gives their places to residents, "drop"
        leaves them empty (`rerouting.py`). A control rather than a way to serve: it loses far more.
    cache_bias : float
        0 is off. Above: an absent expert is replaced only where an available one comes close enough, this share of the
        spread of the router's values (`rerouting.outranked`), and the loss is within the tolerance; else it is loaded.
    predictor : str, callable or None
        "frequency", "recent" (of the last prompts of a task), "transformer" (trained for this model), or a function
        that makes another, called with the number of MoE layers, of experts of the largest layer, and the seed; None
        for on demand only.
    predictor_path : Path or None
        File of a trained predictor; needed for "transformer".
    interval : int
        p: predict before every p-th admitted request (paper, section 3.3).
    replan : str
        "admission" or "interval" (see `planning/control.py`).
    policy : str or callable
        Eviction on demand: "lru", "decayed_demand" (see `loader/eviction.py`), or a rule that chooses who leaves, as
        `loader.slots.lru` does.
    profile : Profile or None
        Task profile; given, insensitive (task, layer) pairs take whatever is resident.
    max_quality_loss : float or None
        Allowed rise of perplexity (0.01 for 1%) in place of a tolerance: the profile then says how many slots each
        layer gets where no budget is given, and which (task, layer) pairs reroute (see `planning/quality_target.py`).
    device, dtype : str
        "auto" takes CUDA where there is one ("cuda:1" the second), and the checkpoint's dtype.
    expert_dtype : str
        "auto" keeps experts in the model's dtype; "int8" rounds them to 8 bits (see `checkpoint/quantization.py`): half
        the memory and half the reads, exact only with respect to the rounded experts.
    tier : str
        Where experts rest: "disk" (the pack) or "host" (host memory, pinned for CUDA).
    direct : bool
        Read the pack past the page cache.
    verify : str
        Checksums of loaded experts: "first" touch, "always" or "never".
    threads : int
        Reading threads.
    record : bool
        Keep a routing trace (`Engine.trace`).
    seed : int
        Of random predictors.
    pack_dir : Path or None
        Where expert packs rest; None is the cache directory.
    attn_implementation : str or None
        As in transformers.
    """

    budget: str | int | float | None = None
    tolerance: float = 0.0
    on_miss: str = REROUTE
    cache_bias: float = 0.0
    predictor: str | PredictorFactory | None = FREQUENCY
    predictor_path: Path | None = None
    interval: int = 40
    replan: str = "admission"
    policy: str | Policy = LRU
    profile: Profile | None = None
    max_quality_loss: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    expert_dtype: str = "auto"
    tier: str = "disk"
    direct: bool = True
    verify: str = "first"
    threads: int = 2
    record: bool = False
    seed: int = 0
    pack_dir: Path | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            Budget.parse(self.budget)
        parse_dtype(self.dtype)
        if self.device != "auto":
            _kind_and_index(self.device)
        if not isinstance(self.tolerance, int | float) or not 0.0 <= self.tolerance <= 1.0:
            raise OptionError(f"tolerance is {self.tolerance}: it must lie in [0, 1], 0 being exact")
        if not isinstance(self.cache_bias, int | float) or not 0.0 <= self.cache_bias < float("inf"):
            raise OptionError(f"cache_bias is {self.cache_bias}: give 0 (off) or more, 0.2 being mild")
        if self.cache_bias and not self.tolerance and self.profile is None:
            raise OptionError(
                "cache_bias only matters where experts may be replaced: give a tolerance, 1.0 for no limit"
            )
        if self.cache_bias and self.on_miss == DROP:
            raise OptionError('cache_bias asks who could take a place: leave it out, or on_miss="drop"')
        if self.max_quality_loss is not None:
            if self.tolerance:
                raise OptionError("give a tolerance or max_quality_loss, not both: the target chooses the tolerance")
            if self.on_miss != REROUTE:
                raise OptionError(
                    "max_quality_loss knows what rerouting loses, not what dropping does: leave on_miss out"
                )
            if self.profile is None:
                raise OptionError(
                    "max_quality_loss needs a task profile of this model: measure one with `emoe model profile MODEL` "
                    "and pass it as profile=Profile.load(path)"
                )
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise OptionError(f"interval is {self.interval!r}: predict every 1 or more requests, 40 being the paper's")
        require_known(self.on_miss, ON_MISS, "on_miss")
        require_known(self.replan, REPLANS, "replan")
        require_known(self.verify, VERIFY, "verify")
        require_known(self.expert_dtype, EXPERT_DTYPES, "expert_dtype")
        require_known(self.tier, ("disk", "host"), "tier")
        if self.threads < 1:
            raise OptionError(f"threads is {self.threads}: at least one thread must read experts")
        require_policy(self.policy)


def open_device(name: str) -> Device:
    """Return the device that a name stands for: "auto" takes CUDA where there is one, "cuda" the current one.

    Raises
    ------
    OptionError
        When it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, index = _kind_and_index(name)
    if kind != "cuda":
        return KINDS[kind](torch.device("cpu"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise OptionError(f"device {name!r} was asked for, but this machine has no CUDA: use 'cpu'")
    # An index from here on: without one, each thread means the device that is current in it.
    index = torch.cuda.current_device() if index is None else index
    if index >= count:
        raise OptionError(f"device {name!r} was asked for, but the last of {count} here is 'cuda:{count - 1}'")
    return KINDS[kind](torch.device("cuda", index))


def resolve_device(name: str) -> torch.device:
    """Return where tensors lie on the device that a name stands for; OptionError when it is not there."""
    return open_device(name).torch_device


def _kind_and_index(name: str) -> tuple[str, int | None]:
    """Return the kind of device and its index, if any; OptionError for a name that stands for none on any machine."""
    kind, colon, index = name.partition(":")
    if kind not in KINDS or (colon and not (kind == "cuda" and index.isdecimal())):
        raise OptionError(f"unknown device {name!r}: use 'auto', 'cpu' or 'cuda' ('cuda:1' for the second)")
    return kind, int(index) if index else None
