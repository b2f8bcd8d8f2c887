"""Which sites are asked in a round."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial


class TooFewSites(ValueError):
    """Fewer sites than a round needs."""


@dataclass(frozen=True)
class Selection:
    """How a round's sites are chosen: `draw(present, round)` gives their names, sorted.

    `required(asked)` of them must answer well for the round to count. `draw` raises TooFewSites.
    """

    draw: Callable[[Iterable[str], int], tuple[str, ...]]
    required: Callable[[int], int]


def fixed_share(fraction: float, min_sites: int, seed: int, quorum: float) -> Selection:
    """A fixed share of the sites without replacement (see `sample`), of which a quorum answers."""
    return Selection(
        lambda present, round_: sample(present, fraction, min_sites, seed, round_),
        lambda asked: max(min_sites, math.ceil(quorum * asked - 1e-9)),
    )


def poisson(rate: float, min_sites: int, chance: Callable[[str, int], float]) -> Selection:
    """Each site by itself with probability `rate`: some rounds ask many sites, some nobody.

    `chance(site, round)` is uniform in [0, 1). Any number of answers is enough, none as well: to
    end a run over them would tell who was drawn. Raises TooFewSites for fewer than `min_sites`.
    """

    def draw(present: Iterable[str], round_: int) -> tuple[str, ...]:
        names = _enough(present, min_sites)
        return tuple(name for name in names if chance(name, round_) < rate)

    return Selection(draw, lambda asked: 0)


def rotation(period: int, min_sites: int, seed: int) -> Selection:
    """Each site in every `period`-th round, its turn decided by its name and the seed.

    Any number of answers is enough. Raises TooFewSites for fewer than `min_sites`.
    """
    turn = partial(seeded_chance, seed, round_=0)

    def draw(present: Iterable[str], round_: int) -> tuple[str, ...]:
        now = (round_ - 1) % period
        names = _enough(present, min_sites)
        return tuple(name for name in names if int(turn(name) * period) == now)

    return Selection(draw, lambda asked: 0)


def seeded_chance(seed: int, site: str, round_: int) -> float:
    """A number in [0, 1), uniform over sites, rounds and seeds."""
    digest = hashlib.sha256(json.dumps([seed, "chance", round_, site]).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def sample(
    names: Iterable[str], fraction: float, min_sites: int, seed: int, round: int
) -> tuple[str, ...]:
    """Draw the sites of round `round` without replacement: at least `fraction` of them, sorted.

    Never fewer than `min_sites`. The draw depends on seed, round and the set of names, not on
    their order: each name gets a seeded hash and the smallest win, so that a site that joins or
    leaves displaces at most one other. Raises TooFewSites when there are fewer than `min_sites`.
    """
    present = _enough(names, min_sites)
    # A tolerance, because 0.28 * 25 is 7.000000000000001 and must not ask an eighth site.
    share = math.ceil(fraction * len(present) - 1e-9)
    count = min(max(share, min_sites, 1), len(present))

    def ticket(name: str) -> str:
        return hashlib.sha256(json.dumps([seed, round, name]).encode()).hexdigest()

    return tuple(sorted(sorted(present, key=ticket)[:count]))


def _enough(names: Iterable[str], min_sites: int) -> list[str]:
    """The names, sorted; raises TooFewSites for too few of them."""
    present = sorted(set(names))
    if len(present) < max(min_sites, 1):
        raise TooFewSites(
            f"Expected at least {max(min_sites, 1)} sites (strategy.min-sites), got "
            f"{len(present)} ({', '.join(present) or 'none'}); connect more SuperNodes or "
            "lower strategy.min-sites."
        )
    return present
