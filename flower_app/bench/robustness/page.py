"""docs/robustness.md, written from the figures: what it says of targets follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flower_app.bench.results import ROOT
from flower_app.bench.robustness.grid import cells as cells_of
from flower_app.bench.robustness.heatmap import heatmap
from flower_app.bench.robustness.table import Entry, Table
from flower_app.bench.robustness.verdicts import GAP, Verdict, verdicts
from flower_app.bench.robustness.whole import RUNS
from flower_app.bench.robustness.words import HEAD, METHOD

DOCS = ROOT / "docs"
PAGE = DOCS / "robustness.md"
FIGURES = DOCS / "robustness.csv"
WHOLE = DOCS / "robustness-whole.json"
AT = 0.2
"""Share of attackers that the targets are stated for."""
NAMES = {"iid": "IID", "dirichlet-0.1": "Dirichlet 0.1"}


def write(table: Table) -> None:
    """Write figures, heat maps and the page; figures of cells that `table` lacks stay."""
    order = [(c.partition, c.fraction, c.attack, c.rule, c.pre) for c in cells_of(quick=False)]
    older = Table.read(FIGURES.read_text()) if FIGURES.is_file() else Table(())
    FIGURES.write_text(table.over(older, order).csv())
    stored = Table.read(FIGURES.read_text())
    for partition in stored.values("partition"):
        (DOCS / f"robustness-{partition}.svg").write_text(drawn(stored, partition))
    PAGE.write_text(render(stored, json.loads(WHOLE.read_text()) if WHOLE.is_file() else []))


def quick(table: Table) -> str:
    """The tables of a small grid, for the terminal."""
    parts = [_defences(table, partition) for partition in table.values("partition")]
    return "\n\n".join([_targets(verdicts(table, AT)), *parts])


def render(table: Table, whole: Sequence[Mapping[str, Any]]) -> str:
    """The page; equal figures give equal pages."""
    parts = [HEAD, _amount(table), "## Targets", _targets(verdicts(table, AT))]
    parts += [_missing_rows(table, partition) for partition in table.values("partition")]
    for partition in table.values("partition"):
        name = NAMES.get(partition, partition)
        parts += [
            f"## {name}: every attack, 20 % attackers",
            _attacks(table, partition),
            f"![Points of accuracy lost behind each defence under each attack, {name}]"
            f"(robustness-{partition}.svg)",
            f"## {name}: every defence, 20 % attackers",
            "Accuracy in percent, mean over seeds, of every cell; the last column is the worst.",
            _defences(table, partition),
            f"## {name}: {_fractions_of(table)} % attackers",
            "Accuracy in percent under the worst attack for each defence, and which one it is.",
            _fractions(table, partition),
            f"## {name}: backdoors, 20 % attackers",
            _backdoors(table, partition),
        ]
    parts += ["## On the whole model", _whole(whole), _refusals(table), METHOD]
    return "\n\n".join(part for part in parts if part) + "\n"


def drawn(table: Table, partition: str) -> str:
    """The heat map of one partition."""
    clean = _clean(table, partition)
    attacks = [name for name in table.values("attack") if name != "none"]
    rows = table.values("defence")

    def lost(defence: str, attack: str) -> float | None:
        entry = _at(table, partition, attack, defence)
        known = entry and entry.accuracy is not None
        return 100 * (clean - entry.accuracy) if known else None  # type: ignore[union-attr, operator]

    points = [[lost(defence, attack) for attack in ["none", *attacks]] for defence in rows]
    title = f"Points of accuracy below the attack-free mean, {NAMES.get(partition, partition)}"
    return heatmap(f"{title}, 20 % attackers", rows, ["none", *attacks], points)


def _clean(table: Table, partition: str) -> float:
    found = table.accuracy(partition=partition, fraction=AT, attack="none", rule="mean", pre="")
    assert found is not None
    return found


def _at(
    table: Table, partition: str, attack: str, defence: str, fraction: float = AT
) -> Entry | None:
    found = table.where(partition=partition, attack=attack, defence=defence, fraction=fraction)
    return found[0] if found else None


def _amount(table: Table) -> str:
    cells = sum(entry.seeds for entry in table.entries)
    few = min(entry.seeds for entry in table.entries)
    most = max(entry.seeds for entry in table.entries)
    seeds = f"{most}" if few == most else f"{few} to {most}"
    attacks, planned = len(table.values("attack")) - 1, len(cells_of(quick=False))
    refused = sum(entry.seeds for entry in table.entries if entry.refused)
    rules, both = table.values("rule"), len(table.both_ways(AT))
    lying = " and ".join(NAMES.get(name, name) for name in table.values("partition"))
    return (
        f"{cells} of the grid's {planned} cells: {attacks} attacks and none, "
        f"{len(table.values('defence'))} defences ({len(rules)} rules alone and behind nearest-"
        f"neighbour mixing, {both} of them with figures both ways), "
        f"{_fractions_of(table)} % attackers, {lying}, {seeds} seeds; {refused} of them were "
        "refused by the rule."
    )


def _fractions_of(table: Table) -> str:
    return ", ".join(f"{100 * fraction:.0f}" for fraction in sorted(table.values("fraction")))


def _targets(found: Sequence[Verdict]) -> str:
    rows = [[v.where, v.target, v.got, v.said] for v in found]
    return _markdown(["Data", "Target", "Measured", ""], rows)


def _missing_rows(table: Table, partition: str) -> str:
    """What no defence can mend, where that alone is more than the target allows."""
    clean, alone = _clean(table, partition), _alone(table, partition)
    if alone is None or 100 * (clean - alone) <= GAP:
        return ""
    return (
        f"{NAMES.get(partition, partition)}: the honest sites alone, without the malicious sites' "
        f"rows, reach {_percent(alone)} %, {100 * (clean - alone):.1f} points below the "
        "attack-free mean, which has them. A defence that sets liars aside cannot be expected to "
        "do better, so that the targets are out of its reach here."
    )


def _alone(table: Table, partition: str) -> float | None:
    """Accuracy of the mean over the honest sites: that of replies which the gate refuses."""
    return table.accuracy(partition=partition, fraction=AT, attack="nan", rule="mean", pre="")


def _attacks(table: Table, partition: str) -> str:
    clean, alone = _clean(table, partition), _alone(table, partition)
    rows = []
    for attack in table.values("attack"):
        chosen = {"partition": partition, "fraction": AT, "attack": attack}
        best, bare = table.best(**chosen), table.accuracy(**chosen, rule="mean", pre="")
        if best is None or best.accuracy is None:
            continue
        rows.append(
            [attack, _percent(bare), best.defence, _percent(best.accuracy),
             f"{100 * (best.accuracy - clean):+.1f}",
             "–" if alone is None else f"{100 * (best.accuracy - alone):+.1f}"]
        )  # fmt: skip
    head = [
        "Attack", "mean", "best defence", "its accuracy", "against the attack-free mean",
        "against the honest alone",
    ]  # fmt: skip
    return (
        f"The attack-free mean reaches {_percent(clean)} %, the mean of the honest sites alone "
        f"{_percent(alone)} %: with `nan` the gate sets the malicious sites aside.\n\n"
        + _markdown(head, rows)
    )


def _defences(table: Table, partition: str) -> str:
    attacks = table.values("attack")
    rows = []
    for defence in table.values("defence"):
        values = [_value(_at(table, partition, attack, defence)) for attack in attacks]
        known = [v for v, a in zip(values, attacks, strict=True) if v is not None and a != "none"]
        worst = min(known) if len(known) == len(attacks) - 1 else None
        rows.append((worst, [defence, *map(_percent, values), _percent(worst)]))
    rows.sort(key=lambda row: -(row[0] or 0.0))
    return _markdown(["Defence", *attacks, "worst"], [cells for _, cells in rows])


def _fractions(table: Table, partition: str) -> str:
    fractions = sorted(table.values("fraction"))
    low = {f: {d: (v, a) for d, v, a in table.worst_case(partition, f)} for f in fractions}
    rows = []
    for defence in table.values("defence"):
        cells = [
            f"{_percent(low[f][defence][0])} ({low[f][defence][1]})" if defence in low[f] else "–"
            for f in fractions
        ]
        rows.append([defence, *cells])
    return _markdown(["Defence", *(f"{100 * f:.0f} %" for f in fractions)], rows)


def _backdoors(table: Table, partition: str) -> str:
    def both(entry: Entry | None) -> str:
        if entry is None or entry.backdoor is None:
            return "–"
        return f"{_percent(entry.backdoor)} ({_percent(entry.flipped)})"

    shown = ["none", "backdoor", "scaling"]
    rows = [
        [defence, *(both(_at(table, partition, attack, defence)) for attack in shown)]
        for defence in table.values("defence")
    ]
    return (
        "Percent of triggered held-out rows of the other class that end up in the attacker's "
        "class; in brackets, of those rows only that the same model puts right without the "
        "trigger.\n\n" + _markdown(["Defence", *shown], rows)
    )


def _whole(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return "Not measured yet: `./scripts/robustness --whole` runs the decisive cells."
    rows = [
        [run["attack"], run["defence"], str(run["seed"]), _percent(run["accuracy"]),
         _percent(run["backdoor"])]
        for run in runs
    ]  # fmt: skip
    said = (
        f"{len(runs)} of {len(RUNS)} runs of `flwr run`: LoRA on every linear layer of MiniLM, "
        "sst2, "
        f"{runs[0]['sites']} sites, IID, {runs[0]['rounds']} rounds, 20 % attackers. "
        "The last column is the success of the backdoor's trigger, from the runs' own summaries."
    )
    return f"{said}\n\n{_markdown(['Attack', 'Defence', 'Seed', 'Accuracy', 'Backdoor'], rows)}"


def _refusals(table: Table) -> str:
    reasons = {
        (entry.defence, entry.fraction): entry.refused for entry in table.entries if entry.refused
    }
    if not reasons:
        return ""
    lines = [
        f"- {defence}, {100 * fraction:.0f} %: {reason}"
        for (defence, fraction), reason in reasons.items()
    ]
    return "## Refused\n\nCells that a rule refuses are no zeros:\n\n" + "\n".join(lines)


def _value(entry: Entry | None) -> float | None:
    return entry.accuracy if entry else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
