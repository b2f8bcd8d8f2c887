"""What the benchmarks print: progress, tables, and the machine they ran on."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Outcome:
    """A benchmark's result as text for people and as records for programs."""

    text: str
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Progress:
    """Lines on standard error with the seconds since the start."""

    started: float = field(default_factory=time.monotonic)

    def __call__(self, text: str) -> None:
        """Print one line."""
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[at]) for row in (columns, *rows)) for at in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = [
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, rows)])


def put_into(page: Path, name: str, text: str) -> None:
    """Replace what a page has between its comments `table:name` and `/table:name`, if any."""
    pattern = re.compile(f"<!-- table:{name} -->.*?<!-- /table:{name} -->", re.DOTALL)
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    block = f"<!-- table:{name} -->\n{text}\n<!-- /table:{name} -->"
    if pattern.search(before):
        page.write_text(pattern.sub(lambda _: block, before), encoding="utf-8")


def machine() -> str:
    """Cores, load and versions: what the numbers of this moment depend on."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), load average at the start {load}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
