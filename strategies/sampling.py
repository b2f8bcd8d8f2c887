"""Which sites are asked in a round."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable


class TooFewSites(ValueError):
    """Fewer sites than a round needs."""


def sample(
    names: Iterable[str], fraction: float, min_sites: int, seed: int, round: int
) -> tuple[str, ...]:
    """Draw the sites of round `round` without replacement: at least `fraction` of them, sorted.

    Never fewer than `min_sites`. The draw depends on seed, round and the set of names, not on
    their order: each name gets a seeded hash and the smallest win, so that a site that joins or
    leaves displaces at most one other. Raises TooFewSites when there are fewer than `min_sites`.
    """
    present = set(names)
    if len(present) < max(min_sites, 1):
        raise TooFewSites(
            f"Expected at least {max(min_sites, 1)} sites (strategy.min-sites), got "
            f"{len(present)} ({', '.join(sorted(present)) or 'none'}); connect more SuperNodes or "
            "lower strategy.min-sites."
        )
    # A tolerance, because 0.28 * 25 is 7.000000000000001 and must not ask an eighth site.
    share = math.ceil(fraction * len(present) - 1e-9)
    count = min(max(share, min_sites, 1), len(present))

    def ticket(name: str) -> str:
        return hashlib.sha256(json.dumps([seed, round, name]).encode()).hexdigest()

    return tuple(sorted(sorted(present, key=ticket)[:count]))
