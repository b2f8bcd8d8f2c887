"""The grid's cells, and running them: several processes, resumable, with progress."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flower_app.bench.robustness.cell import Cell, run_cell
from flower_app.bench.robustness.proxy import Schedule
from flower_app.bench.robustness.task import corpus

Options = tuple[tuple[str, Any], ...]

ATTACKS: Mapping[str, Options] = {
    "none": (),
    "nan": (),
    "label-flip": (),
    "weight-inflation": (),
    "backdoor": (),
    "scaling": (),
    "sign-flip": (),
    "ipm": (),
    "alie": (("scale", 1.5),),  # the paper's own z is near 0 where attackers are few
    "mimic": (),
    "min-max": (("direction", "unit"),),  # hurts more than the default here
    "min-sum": (),
    "one-layer": (),
    "factor-scaling": (),
}
RULES = (
    "mean", "norm-bounding", "median", "trimmed-mean", "krum", "multi-krum", "bulyan",
    "geometric-median", "centered-clipping", "fltrust", "foolsgold",
)  # fmt: skip
PRE = ("", "nnm")
FRACTIONS = (0.2, 0.1, 0.3)  # the one with targets first
PARTITIONS = ("iid", "dirichlet-0.1")
SEEDS = (0, 1, 2)

_QUICK_ATTACKS = ("none", "backdoor", "scaling", "sign-flip", "min-max")
_QUICK_RULES = ("mean", "median", "geometric-median")


def cells(quick: bool) -> list[Cell]:
    """All cells, in the order in which they are run: a part of them is a smaller grid.

    First the share of attackers that has targets, then the others, seed by seed, evenly lying
    rows first.
    """
    attacks = _QUICK_ATTACKS if quick else tuple(ATTACKS)
    axes = (
        FRACTIONS[:1] if quick else FRACTIONS,
        SEEDS[:1] if quick else SEEDS,
        PARTITIONS[:1] if quick else PARTITIONS,
        attacks,
        _QUICK_RULES if quick else RULES,
        PRE,
    )
    found = [
        Cell(attack, ATTACKS[attack], fraction, rule, pre, partition, seed)
        for fraction, seed, partition, attack, rule, pre in itertools.product(*axes)
    ]

    def later(cell: Cell) -> tuple[bool, int, int]:
        return cell.fraction != FRACTIONS[0], cell.seed, PARTITIONS.index(cell.partition)

    return sorted(found, key=later)


def finished(file: Path, schedule: Schedule) -> dict[str, dict[str, Any]]:
    """Lines of cells that were run with this schedule, by key; a line cut short does not count."""
    found: dict[str, dict[str, Any]] = {}
    for text in file.read_text().splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["schedule"] == asdict(schedule):
            found[line["key"]] = line
    return found


def run(
    wanted: Sequence[Cell],
    schedule: Schedule,
    *,
    data: Path,
    cache: Path,
    file: Path,
    processes: int,
) -> bool:
    """Run what is not in `file` yet, a line per cell; whether all of it is there in the end.

    Ctrl-C stops it without losing a finished cell. One process means this one.
    """
    done = finished(file, schedule)
    left = [cell for cell in wanted if cell.key not in done]
    print(f"{len(wanted) - len(left)} of {len(wanted)} cells are done.", flush=True)
    if not left:
        return True
    corpus(data, cache)  # once, before several processes would all work it out
    file.parent.mkdir(parents=True, exist_ok=True)
    progress = _Eta(len(left))
    work = partial(run_cell, schedule=schedule, data=data, cache=cache)
    try:
        with file.open("a") as out, closing(_lines(work, left, processes)) as lines:
            for line in lines:
                out.write(json.dumps(line) + "\n")
                out.flush()
                progress()
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on with what is left.", flush=True)
        return False
    return True


def _lines(
    work: Callable[[Cell], dict[str, Any]], left: Sequence[Cell], processes: int
) -> Generator[dict[str, Any]]:
    """What `work` makes of each cell, as they are done."""
    if processes == 1:
        yield from map(work, left)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,))
    try:
        for future in as_completed([pool.submit(work, cell) for cell in left]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Eta:
    def __init__(self, total: int) -> None:
        self._total, self._done, self._started = total, 0, time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        if self._done % 20 and self._done != self._total:
            return
        spent = time.monotonic() - self._started
        left = spent / self._done * (self._total - self._done)
        print(
            f"{self._done} of {self._total} cells in {spent:.0f} s, about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
