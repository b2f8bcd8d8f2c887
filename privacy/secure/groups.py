"""Which sites are summed together, and which settings go with sums."""

from __future__ import annotations

import random
from collections.abc import Sequence

from models.section import ConfigError
from models.seeds import derive
from privacy.secure.config import SecureConfig
from strategies.cohort import CohortError
from strategies.config import StrategyConfig

# Rules that want nothing but the mean of all updates.
_MEANS = ("mean", "lora-mean", "lora-freeze-a", "lora-alternate", "lora-share-a")
# Rules that take the product of each site's own factors.
_PRODUCTS = ("lora-exact", "lora-stack", "lora-svd")


def drawn(
    sites: Sequence[str], count: int, smallest: int, seed: int, round_: int
) -> list[list[str]]:
    """Divide sites into `count` random groups whose sizes differ by at most one.

    Raises CohortError where a group would have fewer than `smallest` sites.
    """
    if len(sites) < count * smallest:
        raise CohortError(
            f"Expected at least {count * smallest} sites for secure.groups={count} of at least "
            f"secure.min-group={smallest}, got {len(sites)}; add sites, or set fewer groups."
        )
    order = sorted(sites)
    random.Random(derive(seed, "secure groups", round_)).shuffle(order)
    return [sorted(order[at::count]) for at in range(count)]


def check_rule(secure: SecureConfig, strategy: StrategyConfig) -> None:
    """Refuse a rule that needs what a sum does not show; raises ConfigError."""
    if not secure.on:
        return
    if strategy.rule in _PRODUCTS:
        raise ConfigError(
            f"Expected a rule over sums with secure.aggregation={secure.aggregation!r}, got "
            f"strategy.rule={strategy.rule!r}, which needs the factors of each site; set "
            "strategy.rule='lora-freeze-a', whose mean is exact, or 'mean'."
        )
    if secure.groups == 1 and (strategy.rule not in _MEANS or strategy.pre):
        got = f"strategy.rule={strategy.rule!r}, strategy.pre={strategy.pre!r}"
        raise ConfigError(
            f"Expected a mean of all sites with secure.aggregation={secure.aggregation!r} and "
            f"secure.groups=1, got {got}; set secure.groups to compare sums of random groups, or "
            f"strategy.rule='mean' and strategy.pre=''."
        )
