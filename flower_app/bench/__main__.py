"""Command line of the benchmarks: `python -m flower_app.bench simulation | packing | ...`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flower_app.bench import (
    aggregation,
    dp,
    memory,
    packing,
    secure,
    secure_rounds,
    simulation,
    split,
    split_memory,
)
from flower_app.bench.output import Outcome, machine

BENCHMARKS: Mapping[str, Callable[[bool], Outcome]] = {
    "simulation": simulation.measure,
    "packing": packing.measure,
    "memory": memory.measure,
    "split-memory": split_memory.measure,
    "aggregation": aggregation.measure,
    "secure-aggregation": secure.measure,
    "secure-rounds": secure_rounds.measure,
    "dp": dp.measure,
    "split": split.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; prints a table and, with --json, writes every number to a file."""
    parser = argparse.ArgumentParser(
        prog="bench", description="Benchmarks of florilegium, as ratios within one run."
    )
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="less of everything, for a first look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args(arguments)
    # So that a benchmark that is told to stop stops the processes it started, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    before = machine()
    outcome = BENCHMARKS[options.benchmark](options.quick)
    print(f"\n{before}\n\n{outcome.text}")
    if options.json:
        record = {
            "benchmark": options.benchmark,
            "quick": options.quick,
            "machine": before,
            "results": outcome.records,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"\nNumbers: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
