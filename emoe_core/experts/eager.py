"""The family's own eager code over slots: the reference of exactness, and what computes where no form matches it.

The code runs over an object that answers ``gate_up_proj[expert]`` and its siblings with slot tensors. Same products,
same shapes, same order of accumulation: bit-identical to stock ``experts_implementation="eager"``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from emoe_core.checkpoint.adapters import Eager, adapter_of
from emoe_core.checkpoint.quantization import parameter
from emoe_core.experts.compute import LeasedExperts


class EagerForm:
    """How an experts module's own class computes a layer.

    Parameters
    ----------
    module : torch.nn.Module
        The experts module, for all that is not weights of experts.
    params : iterable of str
        Names of its parameters that have an expert axis.
    """

    def __init__(self, module: torch.nn.Module, params: Iterable[str]) -> None:
        self._module = module
        self._params = frozenset(params)
        self._eager = _eager_of(module)

    def layer(
        self,
        lease: LeasedExperts,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        on_host: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute a layer from leased experts: hidden [T, H], index and weights [T, k] -> [T, H]."""
        result: torch.Tensor = self._eager(_ExpertsView(self._module, self._params, lease), hidden, index, weights)
        return result


def _eager_of(module: torch.nn.Module) -> Eager:
    """Return the arithmetic of an experts module's class, to be run over a view whose weights come from slots."""
    adapter = adapter_of(module)
    if adapter is None:
        return type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return adapter.eager or type(module).forward


class _ExpertsView:
    """Stands in for the experts module inside its eager code: weights come from slots, all else from the module."""

    def __init__(self, module: torch.nn.Module, params: frozenset[str], lease: LeasedExperts) -> None:
        self._module = module
        self._params = params
        self._lease = lease

    def __getattr__(self, name: str) -> Any:
        if name in self._params:
            return _ParamView(self._lease, name)
        return getattr(self._module, name)


class _ParamView:
    """``weights[expert]`` answered from a slot."""

    def __init__(self, lease: LeasedExperts, name: str) -> None:
        self._lease = lease
        self._name = name

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return parameter(self._lease[int(expert)], self._name)
