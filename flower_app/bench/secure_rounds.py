"""Whole rounds of a simulation under secure aggregation against plain ones, at equal training.

Every site trains all parameters of the embedded default's shape for one step. Bytes are what a run
counts: the values in Flower's messages, those of the protocol among them. A round's time is that of
the whole machine, Flower's work included; the first round, which loads the models, is left out.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flower_app.bench import bare
from flower_app.bench.bases import DEFAULT, save_base
from flower_app.bench.output import Outcome, Progress, table
from flower_app.bench.simulation import metrics
from flower_app.config import Value
from flower_app.data import embedded
from flower_app.local import flwr_run, process, superlink

TARGET = 1.3
WAYS: Mapping[str, Mapping[str, Value]] = {
    "plain": {},
    "masks, 32 bits": {"secure.aggregation": "masks", "secure.bits": 32},
    "masks, 16 bits": {"secure.aggregation": "masks", "secure.bits": 16},
}
_WORKERS = 2


def measure(quick: bool) -> Outcome:
    """Plain rounds, then those under masks; raises RuntimeError when a site is missing from one."""
    sites, rounds = (10, 2) if quick else (100, 3)
    say = Progress()
    texts = [row["text"] for row in embedded.rows()][:2000]
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="florilegium-bench-") as name:
        folder = Path(name)
        size = save_base(folder / "base", DEFAULT, texts)
        with superlink(folder / "home", simulation=True):
            for number, (way, keys) in enumerate(WAYS.items()):
                say(f"{sites} sites, {size:,} parameters, {way} ...")
                config = {**_config(folder / "base", folder / f"run-{number}", rounds), **keys}
                found = _later(folder / "home", config, sites)
                records.append({"way": way, "sites": sites, "size": size, **found})
    for record in records:
        record |= {
            f"{what}_ratio": record[what] / records[0][what] for what in ("bytes", "seconds")
        }
    return Outcome(_text(records, rounds), records)


def _config(base: Path, output: Path, rounds: int) -> dict[str, Value]:
    return {
        "run.rounds": rounds,
        "run.name": "bench",
        "run.output-dir": str(output),
        "run.roll-call-s": 600.0,
        "model.name": str(base),
        "payload.kind": "full",
        "data.partition": "iid",
        "data.eval-fraction": 0.0,
        "secure.stage-s": 600.0,
        "train.steps": 1,
        "train.batch-size": 1,
        "train.max-length": 32,
    }


def _later(home: Path, config: Mapping[str, Value], sites: int) -> dict[str, float]:
    """Seconds of a round and bytes of one site in it, there and back, after the first round."""
    federation = {
        "num-supernodes": sites, "client-resources-num-cpus": 1, "init-args-num-cpus": _WORKERS,
    }  # fmt: skip
    output = Path(str(config["run.output-dir"]))
    log = home / f"{output.name}.log"
    with process(flwr_run(home, bare.ROOT, config, federation=federation), home, log) as child:
        child.wait()
    rows = [row for row in metrics(output) if row["kind"] == "round"]
    if len(rows) != config["run.rounds"] or any(row["ok"] != sites for row in rows):
        end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"Expected {config['run.rounds']} rounds of all sites, got:\n{end}")
    later = rows[1:]
    return {
        "seconds": statistics.median(row["wall_s"] for row in later),
        "bytes": sum(row["bytes_down"] + row["bytes_up"] for row in later) / len(later) / sites,
    }


def _text(records: Sequence[Mapping[str, Any]], rounds: int) -> str:
    columns = ("round of all sites", "MB a site", "of plain", "s", "of plain")
    rows = [
        [
            r["way"],
            f"{r['bytes'] / 1e6:.2f}",
            f"{r['bytes_ratio']:.3f}",
            f"{r['seconds']:.1f}",
            f"{r['seconds_ratio']:.2f}",
        ]
        for r in records
    ]
    first = records[0]
    return (
        f"{table(columns, rows)}\n\n"
        f"{first['sites']} sites, one step of one row, {first['size']:,} parameters:\n{DEFAULT}.\n"
        f"Median of the {rounds - 1} rounds after the first, on {_WORKERS} workers of one thread. "
        f"MB: there and back,\nas runs count them (target: at most {TARGET} of plain)."
    )
