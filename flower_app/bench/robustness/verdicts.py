"""What was to be reached, and whether it was."""

from __future__ import annotations

from dataclasses import dataclass

from flower_app.bench.robustness.table import Entry, Table

GAP, LOSS, BACKDOOR = 2.0, 1.0, 5.0
"""Targets: points under attack, points without one, percent of triggered rows."""


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured, and whether it was met or by how much it was missed."""

    where: str
    target: str
    got: str
    met: bool
    said: str


def verdicts(table: Table, fraction: float) -> list[Verdict]:
    """All targets for each way in which rows lie, at one share of attackers."""
    found = []
    for partition in table.values("partition"):
        clean = table.accuracy(
            partition=partition, fraction=fraction, attack="none", rule="mean", pre=""
        )
        if clean is not None:
            found += [
                _each_attack(table, partition, fraction, clean),
                *_one_for_all(table, partition, fraction, clean),
                *_backdoor(table, partition, fraction),
            ]
    return found


def judged(where: str, target: str, got: str, value: float, bound: float, unit: str) -> Verdict:
    """Met if `value` is at most `bound`, both in `unit`; else by how much it was missed."""
    # As printed: a target is not missed by a hundredth that nobody can see.
    over = round(value, 1) - bound
    said = "met" if over <= 0 else f"missed by {over:.1f} {unit}"
    return Verdict(where, target, got, over <= 0, said)


def _attacks(table: Table) -> list[str]:
    return [str(name) for name in table.values("attack") if name != "none"]


def _each_attack(table: Table, partition: str, fraction: float, clean: float) -> Verdict:
    gaps = {}
    for attack in _attacks(table):
        best = table.best(partition=partition, fraction=fraction, attack=attack)
        if best is not None:
            gaps[attack] = 100 * (clean - (best.accuracy or 0.0))
    missed = [name for name, gap in gaps.items() if round(gap, 1) > GAP]
    worst = max(gaps, key=gaps.__getitem__)
    got = (
        f"{len(gaps) - len(missed)} of {len(gaps)} attacks; worst {worst}, {gaps[worst]:.1f} points"
    )
    if missed:
        got += f"; missed under {', '.join(missed)}"
    target = f"the best defence for each attack, at most {GAP:.0f} points below attack-free mean"
    return judged(partition, target, got, gaps[worst], GAP, "points")


def _one_for_all(table: Table, partition: str, fraction: float, clean: float) -> list[Verdict]:
    """The defence with the best worst case, under attack and without; none while unknown."""
    ranked = [item for item in table.worst_case(partition, fraction) if item[0] != "mean"]
    if not ranked:
        return []
    defence, low, attack = ranked[0]
    gap = 100 * (clean - low)
    (entry,) = table.where(partition=partition, fraction=fraction, attack="none", defence=defence)
    lost = 100 * (clean - (entry.accuracy or 0.0))
    return [
        judged(
            partition,
            f"one defence for all attacks, at most {GAP:.0f} points below attack-free mean",
            f"{defence}: {gap:.1f} points at worst, under {attack}",
            gap,
            GAP,
            "points",
        ),
        judged(
            partition,
            f"that defence without attack, at most {LOSS:.0f} point lost",
            f"{defence}: {lost:+.1f} points lost",
            lost,
            LOSS,
            "points",
        ),
    ]


def _backdoor(table: Table, partition: str, fraction: float) -> list[Verdict]:
    """Success of the dirty-label trigger behind the defence that stops it best, and beyond chance.

    A model without any backdoor errs on some of those rows too, so both are given.
    """
    known = [
        entry
        for entry in table.where(partition=partition, fraction=fraction, attack="backdoor")
        if entry.backdoor is not None and entry.flipped is not None
    ]
    free = table.where(partition=partition, fraction=fraction, attack="none", defence="mean")
    if not known or not free:
        return []

    def said(entry: Entry, name: str) -> str:
        return f"{entry.defence}: {100 * getattr(entry, name):.1f} %"

    found = []
    for name, what in (
        ("backdoor", "of all triggered rows"),
        ("flipped", "of those put right without the trigger"),
    ):
        best = min(known, key=lambda entry: getattr(entry, name))
        got = f"{said(best, name)}; attack-free mean {100 * getattr(free[0], name):.1f} %"
        target = f"dirty-label backdoor succeeds for at most {BACKDOOR:.0f} % {what}"
        value = 100 * getattr(best, name)
        found.append(judged(partition, target, got, value, BACKDOOR, "points"))
    return found
