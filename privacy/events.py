"""What a run releases, one event per kind of release, in the terms that an accountant needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from models.section import ConfigError, unknown

Unit = Literal["record", "client", "position"]
Relation = Literal["zero-out", "replace-one"]
Part = Literal["training", "held-out"]
Place = Literal["site", "sites", "server"]
# `none` is a release without any noise. The discrete mechanisms are accounted by their bounds in
# concentrated DP: Canonne, Kairouz and Steinke 2020 (theorem 4), Agarwal, Kairouz and Liu 2021
# (theorem 3.5, of which `xi` is the term that does not depend on the order).
Mechanism = Literal["gaussian", "discrete-gaussian", "skellam", "none"]
# Either may be sampled: where a bound with sampling is not known, sampling is not counted.
_SAMPLED: frozenset[str] = frozenset({"gaussian"})
RELATIONS: Mapping[Unit, Relation] = MappingProxyType(
    {"record": "zero-out", "client": "zero-out", "position": "replace-one"}
)


@dataclass(frozen=True)
class Event:
    """`count` releases of one kind by one site in one round; raises ConfigError if incoherent.

    `unit` is what the guarantee protects; a position is one token of one row, as the vectors that
    cross the cut of a split model show it. `relation` zero-out: the contribution of one unit is
    replaced by nothing, while the number of units is public; replace-one, of positions: by that of
    any other. `noise_multiplier` is the standard
    deviation of the noise over the L2 sensitivity; `sample_rate` the Poisson sampling of units
    (1.0: none), whose outcome nobody outside may learn; `xi` the extra Renyi divergence of a
    discrete mechanism. Releases about different `part`s of one `split` of the site's records touch
    different records; an empty split promises nothing. `noise_at` says who adds the noise, and is
    trusted to do so.
    """

    mechanism: Mechanism
    unit: Unit
    noise_multiplier: float = 0.0
    sample_rate: float = 1.0
    count: int = 1
    relation: Relation = "zero-out"
    part: Part = "training"
    split: str = ""
    xi: float = 0.0
    noise_at: Place = "site"
    run: str = ""
    round: int = 0
    site: str = ""

    def __post_init__(self) -> None:
        for what, choices in _CHOICES.items():
            if getattr(self, what) not in choices:
                raise unknown(f"{what} of an event", str(getattr(self, what)), choices)
        if self.relation != RELATIONS[self.unit]:
            raise ConfigError(
                f"Expected relation {RELATIONS[self.unit]!r} in an event of unit {self.unit!r}, "
                f"got {self.relation!r}; correct the event."
            )
        if self.mechanism != "none" and not 0 < self.noise_multiplier < math.inf:
            raise _wrong("a noise multiplier above 0", self.noise_multiplier)
        if not 0 < self.sample_rate <= 1:
            raise _wrong("a sample rate above 0 and at most 1", self.sample_rate)
        if self.sample_rate < 1 and self.mechanism not in _SAMPLED | {"none"}:
            raise _wrong(f"no sampling with {self.mechanism!r}, sample rate 1", self.sample_rate)
        if self.count < 1:
            raise _wrong("a count of at least 1", self.count)
        if not 0 <= self.xi < math.inf or (self.xi and self.mechanism != "skellam"):
            raise _wrong("xi of 0, or above 0 with 'skellam'", self.xi)

    def as_dict(self) -> dict[str, Any]:
        """The event as plain values, for a file."""
        return asdict(self)

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Event:
        """Read what `as_dict` gave; raises ConfigError for unknown or missing names."""
        for name in values:
            if name not in _FIELDS:
                raise unknown("field of an event", str(name), _FIELDS)
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"Expected the fields of an event, but: {error}.") from error

    def seen_as(self, unit: Unit) -> Event:
        """The same release as it touches a unit of another kind: an upper bound, maybe `none`.

        One record changes an update within the clipping norm, so by at most twice that norm: half
        the noise multiplier, and no sampling is counted. Noise for one record says nothing of a
        whole client, and noise for one position nothing of its record.
        """
        if self.unit == unit:
            return self
        if unit == "record" and self.unit == "client" and self.mechanism != "none":
            halved = self.noise_multiplier / 2
            return replace(
                self, unit=unit, noise_multiplier=halved, sample_rate=1.0, xi=2 * self.xi
            )
        return replace(
            self, unit=unit, relation=RELATIONS[unit], mechanism="none", noise_multiplier=0.0,
            xi=0.0,
        )  # fmt: skip


_FIELDS = tuple(field.name for field in fields(Event))
_CHOICES: dict[str, tuple[str, ...]] = {
    "mechanism": get_args(Mechanism),
    "unit": get_args(Unit),
    "relation": get_args(Relation),
    "part": get_args(Part),
    "noise_at": get_args(Place),
}


def of_unit(events: Iterable[Event], unit: Unit) -> list[Event]:
    """All events as they touch one unit; of positions, none but the vectors of streams.

    A guarantee for a position is one for these vectors alone, whatever else leaves the site.
    """
    if unit == "position":
        return [event for event in events if event.unit == unit]
    return [event.seen_as(unit) for event in events]


def _wrong(expected: str, got: float) -> ConfigError:
    return ConfigError(f"Expected {expected} in an event, got {got:g}; correct the event.")
