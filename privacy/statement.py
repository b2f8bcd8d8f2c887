"""An epsilon with all that it needs to mean something, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from privacy.accounting import accountant, spent
from privacy.events import RELATIONS, Event, Unit, of_unit

_OF_UNIT = {
    "record": "one record is one row: who is in several rows is protected less",
    "client": "one client is one site with all that it sends",
    "position": "one position is what a stream carries of one token of one row, in all passes over "
    "the row: the vectors of the other tokens, in which attention lets it show, are not counted",
}
_RELATION = {
    "record": "zero-out: a record's contribution against none; how many rows a site has is public",
    "client": "zero-out: a site's contribution against none; which sites there are is public",
    "position": "replace-one: the vectors of one position against any others; how long the rows "
    "are is public",
}
_STREAM_ALONE = (
    "the vectors of streams alone: trained parameters that travel, losses and scores leave the "
    "site without noise, so that nothing is guaranteed for a row"
)
_NOISE_AT = {
    "server": "the server adds the noise, sees each update without it, and is trusted to",
    "sites": "the noise is the sum of the sites' shares, none of which is known to who attacks: "
    "each site knows its own",
}


@dataclass(frozen=True)
class Statement:
    """Epsilon of one unit, with delta, neighbouring relation, accountant and what it rests on."""

    unit: Unit
    epsilon: float
    delta: float
    relation: str
    accountant: str
    assumptions: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"epsilon {shown(self.epsilon)} per {self.unit} (delta {self.delta:g}, "
            f"{self.relation}, accountant {self.accountant})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: null where nothing is guaranteed."""
        epsilon = self.epsilon if math.isfinite(self.epsilon) else None
        return {**asdict(self), "epsilon": epsilon, "assumptions": list(self.assumptions)}


def state(events: Iterable[Event], unit: Unit, delta: float) -> Statement:
    """What events guarantee a unit together; raises ConfigError for a delta out of range."""
    told = list(events)
    seen = of_unit(told, unit)
    assumptions = [_OF_UNIT[unit], _RELATION[unit]]
    assumptions += [_STREAM_ALONE] if unit == "position" else []
    assumptions += sorted({_NOISE_AT[event.noise_at] for event in seen if event.noise_at != "site"})
    if any(event.sample_rate < 1 for event in seen):
        assumptions.append(
            f"Poisson sampling of {unit}s, of which nobody outside learns who was drawn"
        )
    if any(event.part == "held-out" for event in seen):
        assumptions.append("training rows and held-out rows are different records")
    if any(event.unit != unit for event in told) and unit != "position":
        assumptions.append(f"releases for another unit are counted by what they mean for a {unit}")
    if any(event.mechanism == "none" for event in seen):
        assumptions.append("there were releases without noise: nothing is guaranteed")
    return Statement(
        unit, spent(seen, delta), delta, RELATIONS[unit], accountant(seen), tuple(assumptions)
    )


def shown(epsilon: float) -> str:
    """An epsilon for people, rounded up to three digits: never below what was spent."""
    if not math.isfinite(epsilon) or epsilon <= 0:
        return "0" if epsilon <= 0 else "infinite"
    scale = 10.0 ** (2 - math.floor(math.log10(epsilon)))
    return f"{math.ceil(epsilon * scale - 1e-9) / scale:.6g}"
