"""How the updates of a round get to the server: as they are, or by steps of their own.

An exchange may ask the sites questions before they train and after; it ends with rows for the
rule, each of which stands for one site or for a group of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from torch import Tensor

from models.layout import Layout
from strategies.cohort import Spool
from strategies.config import StrategyConfig
from strategies.gate import Gate, Reply

# What a record of a message holds; a column of a table is a list.
Column: TypeAlias = list[int] | list[float] | list[str] | list[bytes] | list[bool]
Parcel: TypeAlias = Mapping[str, int | float | str | bytes | Column]
# Step, site -> what it is sent, seconds: the answers of those that gave one in time.
Ask: TypeAlias = Callable[[str, Mapping[str, Parcel], float], Mapping[str, Parcel]]


def nbytes(parcel: Parcel) -> int:
    """Bytes of a parcel's values: text and raw bytes by their length, a number as 8."""
    cells = [cell for v in parcel.values() for cell in (v if isinstance(v, list) else [v])]
    return sum(
        len(cell.encode() if isinstance(cell, str) else cell)
        if isinstance(cell, bytes | str)
        else 8
        for cell in cells
    )


@dataclass(frozen=True)
class Sent:
    """What all sites train from in a round: the payload, and what was added to frozen weights."""

    payload: Mapping[str, Tensor]
    fold: Mapping[str, Tensor]


# Decoded when it is asked for: a copy of a whole model, which a plain round has no use for.
Decoded: TypeAlias = Callable[[], Sent]


@dataclass(frozen=True)
class Received:
    """Rows by name, each (D,) float32, their weights, and the sites that each row stands for.

    `failed` says of sites that answered well, and are in no row all the same, why.
    """

    rows: Mapping[str, Tensor]
    weights: Mapping[str, float]
    sites: Mapping[str, tuple[str, ...]]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def counted(self) -> tuple[str, ...]:
        """The sites that are in a row, sorted."""
        return tuple(sorted(site for sites in self.sites.values() for site in sites))


class Intake(Protocol):
    """The updates of one round on their way; a context that cleans up behind them."""

    @property
    def parcels(self) -> Mapping[str, Parcel]:
        """What each site is told with the payload; one that is not here does not train."""

    @property
    def failed(self) -> Mapping[str, str]:
        """Why sites that were asked do not train."""

    def admit(self, reply: Reply) -> None:
        """Take in a reply; raises Refusal for one that does not fit, OSError on a full disk."""

    def lost(self, site: str, why: str) -> None:
        """Hear that a site which was asked says that it cannot."""

    def close(self) -> Received:
        """End the round once no more replies come."""

    def __enter__(self) -> Intake:
        """Nothing to do."""

    def __exit__(self, *_: object) -> None:
        """Clean up."""


class Exchange(Protocol):
    """Opens the intake of each round; what is to be asked before a score alone is `ready`'s."""

    def ready(self, asked: Sequence[str], ask: Ask) -> Mapping[str, str]:
        """Ask sites for what they need to score a payload; why some of them cannot, by site."""
        return {}

    def open(self, round_: int, asked: Sequence[str], sent: Decoded, ask: Ask) -> Intake:
        """Begin a round with the sites `asked`; raises CohortError if it cannot be held."""


class Plain(Exchange):
    """The server sees every update: the gate checks it, a file keeps it till the rule wants it."""

    def __init__(self, settings: StrategyConfig, layout: Layout, spool: Path) -> None:
        self._settings = settings
        self._layout = layout
        self._spool = spool

    def open(self, round_: int, asked: Sequence[str], sent: Decoded, ask: Ask) -> PlainIntake:
        """Begin a round; nobody is asked anything before."""
        s = self._settings
        gate = Gate(round_, self._layout, asked, s.max_update_norm, s.weight_cap)
        return PlainIntake(gate, asked, Spool(self._spool), s.weighting == "uniform")


class PlainIntake:
    """The gate and the spool of one round."""

    def __init__(self, gate: Gate, asked: Collection[str], spool: Spool, uniform: bool) -> None:
        self.parcels: Mapping[str, Parcel] = {site: {} for site in asked}
        self.failed: Mapping[str, str] = {}
        self._gate = gate
        self._spool = spool
        self._uniform = uniform
        self._weights: dict[str, float] = {}

    def admit(self, reply: Reply) -> None:
        """Check a reply and keep its update; raises Refusal or OSError."""
        update = self._gate.admit(reply)
        self._spool.put(update.site, update.delta_D)
        self._weights[update.site] = 1.0 if self._uniform else float(update.num_examples)

    def lost(self, site: str, why: str) -> None:
        """Nobody waits for it."""

    def close(self) -> Received:
        """One row for each site."""
        return Received(self._spool, self._weights, {site: (site,) for site in self._weights})

    def __enter__(self) -> PlainIntake:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the files."""
        self._spool.clear()
