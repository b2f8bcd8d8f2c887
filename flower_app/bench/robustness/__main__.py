"""Command line of the grid: `python -m flower_app.bench.robustness --quick`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flower_app.bench.results import ROOT
from flower_app.bench.robustness import grid, page, whole
from flower_app.bench.robustness.proxy import Schedule
from flower_app.bench.robustness.table import Table
from flower_app.local import stop_on_terminate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left of the grid; write the table, the heat maps and docs/robustness.md."""
    parser = argparse.ArgumentParser(prog="robustness", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small grid, printed only")
    parser.add_argument(
        "--whole", action="store_true", help="the decisive cells on the whole model"
    )
    parser.add_argument(
        "--fractions", type=float, nargs="+", choices=grid.FRACTIONS, default=grid.FRACTIONS,
        help="shares of attackers to run; figures of the others stay as they are",
    )  # fmt: skip
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--cache", type=Path, default=Path("~/.florilegium/robustness"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    stop_on_terminate()
    data, cache = options.data.resolve(), options.cache.expanduser()
    if not (data / "sst2").is_dir():
        print(f"Expected the data set sst2 in {data}, found none; name its folder with --data.")
        return 2
    schedule = Schedule()
    if options.whole:
        return 0 if whole.run(data, page.WHOLE, options.processes) else 1
    wanted = [cell for cell in grid.cells(options.quick) if cell.fraction in options.fractions]
    file = cache / "cells.jsonl"
    if not options.page and not grid.run(
        wanted, schedule, data=data, cache=cache, file=file, processes=options.processes
    ):
        return 1
    lines = grid.finished(file, schedule)
    table = Table.of([lines[cell.key] for cell in wanted if cell.key in lines])
    if options.quick:
        print(page.quick(table))
    else:
        page.write(table)
        print(f"Written: {page.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
