"""What an adversary knows when it writes the updates of its sites.

Shape suffixes: N honest sites, M malicious sites, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from models.layout import Layout
from strategies.attacks.config import AttackConfig


@dataclass(frozen=True, eq=False)
class View:
    """An omniscient adversary's knowledge of a round: all updates and the global payload.

    `honest_ND` are the honest sites' deltas, in the order of their names, and `own_MD` what the
    malicious sites' own training gave; both float32, N and M at least 1. `base_D` is the payload
    that all of them started from.
    """

    honest_ND: Tensor
    own_MD: Tensor
    base_D: Tensor
    layout: Layout

    @property
    def malicious(self) -> int:
        """Number of malicious sites, M."""
        return len(self.own_MD)

    @property
    def sites(self) -> int:
        """Number of all sites, N + M."""
        return len(self.honest_ND) + len(self.own_MD)

    def same(self, row_D: Tensor) -> Tensor:
        """One delta (D,) sent by every malicious site, (M, D)."""
        return row_D.float().expand(self.malicious, -1).clone()


Forge: TypeAlias = Callable[[View, AttackConfig, torch.Generator], Tensor]
"""View, settings (with `scale` resolved) and generator to the deltas that are sent, (M, D)."""
