"""The grid's figures: means over seeds, and what follows from them."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEASURES = ("accuracy", "backdoor", "flipped")
FIELDS = (
    "partition", "fraction", "attack", "rule", "pre", "seeds", "accuracy", "accuracy_sd",
    "backdoor", "flipped", "refused",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Mean over seeds of one cell of the grid; the figures are None where the rule refused."""

    partition: str
    fraction: float
    attack: str
    rule: str
    pre: str
    seeds: int
    accuracy: float | None
    accuracy_sd: float | None
    backdoor: float | None
    flipped: float | None
    refused: str

    @property
    def axes(self) -> tuple[str, float, str, str, str]:
        """Which cell it is."""
        return self.partition, self.fraction, self.attack, self.rule, self.pre

    @property
    def defence(self) -> str:
        """Rule and stage before it, as a person writes it."""
        return f"{self.pre} + {self.rule}" if self.pre else self.rule


@dataclass(frozen=True)
class Table:
    """All entries, in the grid's order."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Table:
        """Means over the seeds of the grid's lines."""
        groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
        for line in lines:
            groups[tuple(line[name] for name in FIELDS[:5])].append(line)
        return cls(tuple(_entry(key, group) for key, group in groups.items()))

    @classmethod
    def read(cls, text: str) -> Table:
        """The table in a CSV text, as `csv` writes it."""
        return cls(tuple(_parsed(row) for row in csv.DictReader(io.StringIO(text))))

    def over(self, older: Table, order: Iterable[tuple[Any, ...]]) -> Table:
        """These entries, and `older` ones of cells that are not here or have fewer seeds here.

        `order` gives the first five fields of every cell, in the grid's order.
        """
        found = {entry.axes: entry for entry in older.entries}
        for entry in self.entries:
            if entry.axes not in found or found[entry.axes].seeds <= entry.seeds:
                found[entry.axes] = entry
        return Table(tuple(found[axes] for axes in dict.fromkeys(order) if axes in found))

    def csv(self) -> str:
        """Every entry as a line of CSV, under a line of names."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(FIELDS)
        for entry in self.entries:
            values = (getattr(entry, name) for name in FIELDS)
            writer.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in values])
        return out.getvalue()

    def where(self, **wanted: object) -> list[Entry]:
        """Entries with these values, in order."""
        return [
            entry
            for entry in self.entries
            if all(getattr(entry, name) == value for name, value in wanted.items())
        ]

    def accuracy(self, **wanted: object) -> float | None:
        """Mean accuracy of the one entry with these values; None if it is missing or refused."""
        found = self.where(**wanted)
        return found[0].accuracy if len(found) == 1 else None

    def values(self, name: str) -> list[Any]:
        """Distinct values of a field, in order."""
        return list(dict.fromkeys(getattr(entry, name) for entry in self.entries))

    def both_ways(self, fraction: float) -> list[str]:
        """Rules that no cell refuses at a share of attackers, neither alone nor behind a stage."""

        def known(rule: str, pre: str) -> bool:
            mine = self.where(rule=rule, pre=pre, fraction=fraction)
            return bool(mine) and all(entry.accuracy is not None for entry in mine)

        stages = self.values("pre")
        alone = "" in stages and len(stages) > 1
        return [
            rule for rule in self.values("rule") if alone and all(known(rule, p) for p in stages)
        ]

    def best(self, **wanted: object) -> Entry | None:
        """The defence (all but the bare mean) with the highest accuracy among entries."""
        known = [e for e in self.where(**wanted) if e.accuracy is not None and e.defence != "mean"]
        return max(known, key=lambda e: e.accuracy or 0.0, default=None)

    def worst_case(self, partition: str, fraction: float) -> list[tuple[str, float, str]]:
        """Defence, lowest accuracy over all attacks, and that attack; the best defence first.

        A defence that refused, or was not tried under all of them, is left out.
        """
        attacks = set(self.values("attack")) - {"none"}
        found = []
        for defence in self.values("defence"):
            mine = [
                e
                for e in self.where(partition=partition, fraction=fraction)
                if e.defence == defence and e.attack != "none"
            ]
            known = {e.attack for e in mine if e.accuracy is not None}
            if known == attacks:
                low = min(mine, key=lambda e: e.accuracy or 0.0)
                found.append((defence, low.accuracy or 0.0, low.attack))
        return sorted(found, key=lambda item: -item[1])


def _entry(key: tuple[Any, ...], lines: Sequence[Mapping[str, Any]]) -> Entry:
    axes = dict(zip(FIELDS[:5], key, strict=True))
    reasons = [str(line["refused"]) for line in lines if line.get("refused")]
    if reasons:
        return Entry(
            **axes, seeds=len(lines), accuracy=None, accuracy_sd=None, backdoor=None, flipped=None,
            refused=reasons[0],
        )  # fmt: skip
    accuracy, backdoor, flipped = (
        statistics.mean(line[name] for line in lines) for name in MEASURES
    )
    spread = statistics.stdev(line["accuracy"] for line in lines) if len(lines) > 1 else 0.0
    return Entry(
        **axes, seeds=len(lines), accuracy=accuracy, accuracy_sd=spread, backdoor=backdoor,
        flipped=flipped, refused="",
    )  # fmt: skip


def _parsed(row: Mapping[str, str]) -> Entry:
    def number(name: str) -> float | None:
        return float(row[name]) if row[name] else None

    return Entry(
        row["partition"], float(row["fraction"]), row["attack"], row["rule"], row["pre"],
        int(row["seeds"]), number("accuracy"), number("accuracy_sd"), number("backdoor"),
        number("flipped"), row["refused"],
    )  # fmt: skip
