"""Shows what a ledger says: epsilon spent and remaining, by which releases, on what it rests."""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from models.section import ConfigError
from privacy.events import Event, Unit
from privacy.ledger import FILE, Ledger, LedgerError
from privacy.policy import Policy, read_policy
from privacy.statement import state

_DELTA = 1e-5


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one or more ledgers; exit status 2 on bad input and for a ledger that was changed."""
    parser = argparse.ArgumentParser(prog="ledger", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="epsilon spent and remaining")
    which = show.add_mutually_exclusive_group(required=True)
    which.add_argument("--ledger", type=Path, help=f"a ledger, such as <state-path>/{FILE}")
    which.add_argument(
        "--run", type=Path, help="run folder, such as runs/latest: all ledgers of it"
    )
    show.add_argument("--policy", type=Path, help="policy of a site, for what remains")
    show.add_argument("--delta", type=float, help=f"the policy's, or {_DELTA:g}")
    options = parser.parse_args(arguments)
    try:
        policy = read_policy(options.policy) if options.policy else None
        delta = options.delta or (policy.delta if policy else _DELTA)
        for name, path in _ledgers(options):
            print("\n".join(_lines(name, Ledger(path).events(), path, policy, delta)))
    except (ConfigError, LedgerError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _ledgers(options: argparse.Namespace) -> list[tuple[str, Path]]:
    if options.ledger:
        found = [("Ledger", options.ledger)]
    else:
        run = options.run.resolve()
        sites = sorted((run / "sites").glob(f"*/{FILE}"))
        found = [("Server", run.parent / FILE), *((path.parent.name, path) for path in sites)]
    there = [(name, path) for name, path in found if path.is_file()]
    if not there:
        looked = ", ".join(str(path) for _, path in found)
        raise ConfigError(
            f"Expected a ledger, got none at {looked}; name one with --ledger, or a run that had "
            "privacy.unit set. The ledger of a deployed site lies in its state-path."
        )
    return there


def _lines(
    name: str, events: Sequence[Event], path: Path, policy: Policy | None, delta: float
) -> Iterator[str]:
    yield f"{name}: {path}"
    required = [policy.require_unit] if policy and policy.require_unit else []
    units: list[Unit] = sorted({event.unit for event in events} | set(required))
    for unit in units or ["record"]:
        told = state(events, unit, delta)
        yield f"  spent      {told}"
        if policy and policy.max_epsilon and delta == policy.delta and policy.limits(unit):
            left = max(0.0, policy.max_epsilon - told.epsilon)
            yield f"  remaining  {left:.3g} of epsilon {policy.max_epsilon:g} (max-epsilon)"
        beside = [_beside(events)] if math.isfinite(told.epsilon) else []
        yield from (f"  assumes    {assumption}" for assumption in (*told.assumptions, *beside))
    yield from _table(events)


def _beside(events: Sequence[Event]) -> str:
    """What a ledger cannot know of releases that are not in it."""
    if not any(event.site for event in events):
        return "no site took part in runs without noise, which the server's ledger does not hold"
    first = events[0]
    return (
        f"nothing of these rows left without noise before this ledger began (run {first.run!r}, "
        f"round {first.round}), nor while the site named no state-path"
    )


def _table(events: Sequence[Event]) -> Iterator[str]:
    """One row for each kind of release in a run."""
    rounds: dict[tuple[str, ...], list[int]] = defaultdict(list)
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for event in events:
        sampling = f"Poisson {event.sample_rate:.4g}" if event.sample_rate < 1 else "none"
        noise = f"{event.noise_multiplier:.4g}" if event.mechanism != "none" else "-"
        kind = (event.run, event.mechanism, event.unit, event.part, noise, sampling)
        rounds[kind].append(event.round)
        counts[kind] += event.count
    heads = ("run", "mechanism", "unit", "rows", "noise", "sampling", "count", "rounds")
    rows = [
        (*kind, str(counts[kind]), f"{min(rounds[kind])}-{max(rounds[kind])}") for kind in rounds
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells).rstrip()}"


if __name__ == "__main__":
    sys.exit(main())
