"""The rules against flwr's own strategies and byzfl, in time and memory, over sites and sizes.

Each measurement runs in a fresh process of one thread; updates lie in files, which ours maps as the
server's spool does (they stay in the page cache), and which the other sides hold in memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from flower_app.bench.bare import THREADS
from flower_app.bench.output import Outcome, Progress, table
from flower_app.bench.sides import COPY, SIDES, Measured, Specification, has
from strategies.registry import RULES

SITES = (8, 64, 512)
SIZES = (100_000, 10_000_000)
COMPARED = (
    "mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median",
    "centered-clipping",
)  # fmt: skip
TIMEOUT_S = 90.0
COPIES = 4
"""Times over which the other sides hold the updates: replies, their stack, a copy to sort, rest."""


def measure(quick: bool) -> Outcome:
    """Time and memory of every rule that is registered and has a counterpart, side by side."""
    say = Progress()
    records: list[dict[str, Any]] = []
    for size in SIZES[:1] if quick else SIZES:
        for sites in SITES[:2] if quick else SITES:
            records += _cell(sites, size, 1.0 if quick else 5.0, say)
    return Outcome(_text(records), records)


def _cell(sites: int, size: int, budget_s: float, say: Progress) -> list[dict[str, Any]]:
    """All rules and sides for one number of sites and one size."""
    needed, free = 4 * sites * size, psutil.virtual_memory().available
    room = shutil.disk_usage(tempfile.gettempdir()).free
    cell: dict[str, Any] = {"sites": sites, "size": size, "byzantine": max(1, sites // 5)}
    if needed > 0.5 * min(free, room):
        reason = f"updates of {_gib(needed)}, {_gib(free)} of memory and {_gib(room)} of disk free"
        return [{**cell, "rule": "all", "side": "all", "skipped": reason}]
    records = []
    with tempfile.TemporaryDirectory(prefix="florilegium-bench-") as folder:
        _write(Path(folder), sites, size)
        for rule, side in _pairs():
            say(f"{sites} sites, {size:,} numbers: {rule}, {side} ...")
            spec = Specification(side, rule, sites, size, cell["byzantine"], folder, budget_s)
            records.append({**cell, "rule": rule, "side": side, **_measured(spec)})
    return records


def _pairs() -> Iterator[tuple[str, str]]:
    for rule in (COPY, *(name for name in COMPARED if name in RULES)):
        yield from ((rule, side) for side in SIDES if has(side, rule))


def _write(folder: Path, sites: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(sites):
        row = torch.randn(size, generator=generator)
        (folder / f"{number:06d}.f32").write_bytes(row.numpy().data)


def _measured(spec: Specification) -> dict[str, Any]:
    """Seconds and memory, or why there are none."""
    if spec.side.startswith("byzfl") and importlib.util.find_spec("byzfl") is None:
        return {"skipped": "byzfl is not installed; ./scripts/setup dev installs it"}
    needed, free = COPIES * 4 * spec.sites * spec.size, psutil.virtual_memory().available
    if spec.side != "ours" and needed > 0.8 * free:
        return {"skipped": f"would need about {_gib(needed)}, {_gib(free)} are free"}
    command = [sys.executable, "-m", "flower_app.bench.sides", json.dumps(asdict(spec))]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            env={**os.environ, **THREADS},
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"took over {TIMEOUT_S:.0f} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"skipped": f"failed: {last}"}
    measured = Measured(**json.loads(done.stdout.splitlines()[-1]))
    return {**asdict(measured), "best_s": min(measured.seconds)}


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _text(records: Sequence[dict[str, Any]]) -> str:
    columns = (
        "sites", "numbers", "rule", "ours", "flwr", "byzfl", "MiB ours", "flwr", "byzfl"
    )  # fmt: skip
    found = {(r["sites"], r["size"], r["rule"], r["side"]): r for r in records}
    rows = [_row(found, *key[:3]) for key in found if key[3] == "ours"]
    skipped = {
        f"{r['sites']} sites, {r['size']:,} numbers, {r['rule']}, {r['side']}: {r['skipped']}."
        for r in records
        if "skipped" in r
    }
    return "\n".join(
        [
            table(columns, rows),
            "",
            "One thread each. ours: milliseconds, best of up to 5. flwr, byzfl: times as long\n"
            "they take (byzfl on numpy arrays or on torch tensors, whichever is faster). MiB:\n"
            "growth of the process at its peak; ours maps files, the others hold all updates.\n"
            "copy: the same bytes copied row by row.",
            *_bandwidth(found),
            *(["Skipped:", *sorted(skipped)] if skipped else []),
        ]
    )


def _row(found: dict[Any, dict[str, Any]], sites: int, size: int, rule: str) -> list[str]:
    ours = found[sites, size, rule, "ours"]
    sides = [
        [found.get((sites, size, rule, "flwr"), {})],
        [found.get((sites, size, rule, f"byzfl {kind}"), {}) for kind in ("numpy", "torch")],
    ]
    best = [min(side, key=lambda r: r.get("best_s", np.inf)) for side in sides]
    times, peaks = [], []
    for other in best:
        both = "best_s" in other and "best_s" in ours
        times.append(f"{other['best_s'] / ours['best_s']:.2f}" if both else "-")
        peaks.append(f"{other['grown'] / 2**20:.0f}" if "grown" in other else "-")
    own = f"{1000 * ours['best_s']:.1f}" if "best_s" in ours else "-"
    grown = f"{ours['grown'] / 2**20:.0f}" if "grown" in ours else "-"
    return [str(sites), f"{size:,}", rule, own, *times, grown, *peaks]


def _bandwidth(found: dict[Any, dict[str, Any]]) -> Iterator[str]:
    """The mean's throughput as a share of what a plain copy of the same bytes reaches."""
    for (sites, size, rule, side), mean in found.items():
        copy = found.get((sites, size, COPY, "ours"), {})
        if rule == "mean" and side == "ours" and "best_s" in mean and "best_s" in copy:
            yield (
                f"Mean of {sites} x {size:,}: {copy['best_s'] / mean['best_s']:.2f} of a copy's "
                f"{4 * sites * size / copy['best_s'] / 1e9:.1f} GB/s (target 0.5)."
            )
