"""The miss tolerance of a (task, layer): how much router weight may go to other experts than the router chose.

0 loads whatever is absent, 1 loads nothing. The first that has an answer decides: the request itself, the quality
target, the profile (a layer that it calls insensitive may lose everything), the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from emoe_core.planning.quality_target import QualityPlan
from emoe_core.planning.tasks import Profile


@dataclass(frozen=True)
class MissTolerance:
    """Whose word counts at one engine: its own ``default``, a profile and a quality target, where there are any."""

    default: float
    profile: Profile | None = None
    quality: QualityPlan | None = None

    def of(self, task: str, layer: int, own: float | None = None) -> float:
        """Return the tolerance in [0, 1]; ``own`` is what the request brought, None where it left that open."""
        if own is not None:
            return own
        if self.quality is not None:
            return 0.0 if self.quality.is_exact(task, layer) else 1.0
        if self.profile is not None and not self.profile.sensitive(task, layer):
            return 1.0
        return self.default
