"""The `flwr run` simulation against bare PyTorch loops that do the same optimiser steps.

Both sides use two processes of one thread. Time counts from the first round on: the simulation's
first round is the `wall_s` of its metrics row, the later ones are the time between two such rows,
so that checkpoints, messages and polling are in it. The bare loops have their batches ready before
the clock starts, and do not wait for each other between rounds.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flower_app.bench import bare
from flower_app.bench.bases import LARGE, SMALL, Shape, save_base
from flower_app.bench.output import Outcome, Progress, table
from flower_app.config import Value
from flower_app.data import embedded
from flower_app.local import environment, flwr_run, process, superlink

SITES = 4
WORKERS = 2
TARGET = 0.95
_POLL_S = 0.05
# Ray gives its workers a lower priority than other programs; here both sides get the same.
_FAIR = {"RAY_worker_niceness": "0"}


@dataclass(frozen=True)
class Case:
    """What both sides train; `steps` per site and round."""

    shape: Shape
    payload: str
    steps: int
    batch_size: int
    max_length: int = 128
    rounds: int = 3
    repeats: int = 2

    @property
    def name(self) -> str:
        """Short name in tables."""
        return f"{self.shape.name} {self.payload}"

    def config(self, base: Path, output: Path) -> dict[str, Value]:
        """The run config; the same for both sides."""
        return {
            "run.rounds": self.rounds,
            "run.name": "bench",
            "run.output-dir": str(output),
            "run.deadline-s": 300.0,
            "model.name": str(base),
            "payload.kind": self.payload,
            "data.eval-fraction": 0.0,
            "train.steps": self.steps,
            "train.batch-size": self.batch_size,
            "train.max-length": self.max_length,
        }


@dataclass(frozen=True)
class Measured:
    """Tokens per second of one run in the first and in the later rounds, and seconds per round."""

    first: float
    later: float
    first_s: float
    later_s: float
    losses: dict[str, float]
    base_reads: dict[str, int]
    spent: dict[str, float]


CASES = (
    Case(SMALL, "lora", steps=50, batch_size=8),
    Case(LARGE, "lora", steps=5, batch_size=2),
    Case(SMALL, "full", steps=50, batch_size=8, rounds=2, repeats=1),
)
QUICK = (
    Case(SMALL, "lora", steps=30, batch_size=8, rounds=2, repeats=1),
    Case(LARGE, "lora", steps=4, batch_size=2, rounds=2, repeats=1),
)


def measure(quick: bool) -> Outcome:
    """Run all cases, bare and federated in turn; raises RuntimeError when the two sides differ."""
    cases = QUICK if quick else CASES
    say = Progress()
    records: list[dict[str, Any]] = []
    texts = [row["text"] for row in embedded.rows()][:2000]
    with tempfile.TemporaryDirectory(prefix="florilegium-bench-") as name:
        folder = Path(name)
        sizes = {
            shape: save_base(folder / shape.name, shape, texts)
            for shape in dict.fromkeys(case.shape for case in cases)
        }
        with superlink(folder / "home", simulation=True, extra=_FAIR):
            for case in cases:
                runs = _alternate(case, folder, say)
                records.append(_record(case, sizes[case.shape], runs))
    return Outcome(_text(records), records)


def _alternate(case: Case, folder: Path, say: Progress) -> dict[str, list[Measured]]:
    runs: dict[str, list[Measured]] = {"bare": [], "federated": []}
    for repeat in range(case.repeats):
        config = case.config(folder / case.shape.name, folder / f"{case.name}-{repeat}")
        for side, run in (("bare", _bare), ("federated", _federated)):
            say(f"{case.name}, {side}, run {repeat + 1} of {case.repeats} ...")
            measured = run(config, folder / "home")
            runs[side].append(measured)
            say(
                f"  {measured.first:.0f} tokens/s in the first round ({measured.first_s:.1f} s), "
                f"{measured.later:.0f} in later ones ({measured.later_s:.1f} s each)"
            )
    _same_work(case, runs)
    return runs


def _same_work(case: Case, runs: Mapping[str, Sequence[Measured]]) -> None:
    """Both sides must have taken the same steps: the losses of the first round tell."""
    reference, *others = [measured.losses for side in runs.values() for measured in side]
    for losses in others:
        if losses.keys() != reference.keys() or not all(
            math.isclose(losses[site], reference[site], rel_tol=1e-4) for site in reference
        ):
            raise RuntimeError(
                f"Expected the same losses on both sides of {case.name!r}, got {reference} and "
                f"{losses}; the comparison is void."
            )


def _bare(config: Mapping[str, Value], home: Path) -> Measured:
    loops = bare.run(config, SITES, WORKERS, environment(home))
    later = [sum(loop.seconds[1:]) for loop in loops]
    first_s, later_s = max(loop.seconds[0] for loop in loops), max(later)
    return Measured(
        first=sum(loop.tokens[0] for loop in loops) / first_s,
        later=sum(sum(loop.tokens[1:]) for loop in loops) / later_s,
        first_s=first_s,
        later_s=later_s / (len(loops[0].seconds) - 1),
        losses={site: loss for loop in loops for site, loss in loop.losses.items()},
        base_reads={},
        spent={},
    )


def _federated(config: Mapping[str, Value], home: Path) -> Measured:
    output = Path(str(config["run.output-dir"]))
    federation = {
        "num-supernodes": SITES,
        "client-resources-num-cpus": 1,
        "init-args-num-cpus": WORKERS,
    }
    command = flwr_run(home, bare.ROOT, config, federation=federation)
    log = home / f"{output.name}.log"
    with process(command, home, log) as child:
        stamps = _watch(child, output)
    rows = metrics(output)
    rounds = [row for row in rows if row["kind"] == "round"]
    if len(rounds) != config["run.rounds"] or len(stamps) != len(rounds):
        end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"Expected {config['run.rounds']} rounds, got {len(rounds)}:\n{end}")
    sites = [row for row in rows if row["kind"] == "site"]
    tokens = {
        round_["round"]: sum(s["tokens"] for s in sites if s["round"] == round_["round"])
        for round_ in rounds
    }
    first_s, later_s = rounds[0]["wall_s"], stamps[-1] - stamps[0]
    return Measured(
        first=tokens[1] / first_s,
        later=sum(tokens[round_] for round_ in tokens if round_ > 1) / later_s,
        first_s=first_s,
        later_s=later_s / (len(rounds) - 1),
        losses={s["site"]: s["train_loss"] for s in sites if s["round"] == 1},
        base_reads={s["worker"]: s["base_reads"] for s in sites},
        spent=_spent(rounds[1:], sites, later_s),
    )


def _watch(child: subprocess.Popen[bytes], output: Path) -> list[float]:
    """Moments at which the rounds' rows appeared in the metrics, until the command ends."""
    stamps: list[float] = []
    size = 0
    while child.poll() is None:
        for file in output.glob("2*/metrics.jsonl"):
            if file.stat().st_size != size:
                size = file.stat().st_size
                now = time.monotonic()
                done = sum(row["kind"] == "round" for row in metrics(output))
                stamps += [now] * (done - len(stamps))
        time.sleep(_POLL_S)
    return stamps


def metrics(output: Path) -> list[dict[str, Any]]:
    """Whole rows of the metrics of the run under `output`."""
    files = list(output.glob("2*/metrics.jsonl"))
    text = files[0].read_text(encoding="utf-8") if files else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _spent(
    rounds: Sequence[Mapping[str, Any]], sites: Sequence[Mapping[str, Any]], total_s: float
) -> dict[str, float]:
    """Shares of the later rounds' time, by what the busiest worker of each round did."""
    shares: dict[str, float] = defaultdict(float)
    for round_ in rounds:
        busy: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for site in sites:
            if site["round"] == round_["round"]:
                for what in ("train_s", "load_s", "eval_s"):
                    busy[site["worker"]][what] += site[what]
        for what, seconds in max(busy.values(), key=lambda part: sum(part.values())).items():
            shares[what.removesuffix("_s")] += seconds / total_s
        shares["aggregate"] += round_["aggregate_s"] / total_s
    shares["rest"] = 1.0 - sum(shares.values())
    return dict(shares)


def _record(case: Case, size: int, runs: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    def median(side: str, what: str) -> float:
        return statistics.median(float(getattr(measured, what)) for measured in runs[side])

    reads = [reads for measured in runs["federated"] for reads in measured.base_reads.values()]
    return {
        "case": case.name,
        "model": str(case.shape),
        "parameters": size,
        "settings": {k: v for k, v in asdict(case).items() if k != "shape"},
        "ratio_first": median("federated", "first") / median("bare", "first"),
        "ratio_later": median("federated", "later") / median("bare", "later"),
        "median": {
            side: {what: median(side, what) for what in ("first", "later", "first_s", "later_s")}
            for side in runs
        },
        "spent": {
            what: statistics.median(m.spent[what] for m in runs["federated"])
            for what in runs["federated"][0].spent
        },
        "base_reads_per_worker": max(reads),
        "workers": [len(measured.base_reads) for measured in runs["federated"]],
        "runs": {side: [asdict(measured) for measured in done] for side, done in runs.items()},
    }


def _text(records: Sequence[Mapping[str, Any]]) -> str:
    columns = (
        "tokens/s after start-up", "bare first", "federated", "ratio", "bare later", "federated",
        "ratio", "round", "base reads/worker",
    )  # fmt: skip
    rows = []
    for record in records:
        bare_, federated = record["median"]["bare"], record["median"]["federated"]
        cells = [f"{bare_[what]:.0f} {federated[what]:.0f}".split() for what in ("first", "later")]
        rows.append(
            [
                record["case"],
                *cells[0],
                f"{record['ratio_first']:.3f}",
                *cells[1],
                f"{record['ratio_later']:.3f}",
                f"{federated['later_s']:.1f} s",
                str(record["base_reads_per_worker"]),
            ]
        )
    return "\n".join([table(columns, rows), "", *map(_notes, records), "", _verdict(records)])


def _notes(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    spent = ", ".join(f"{what} {100 * share:.1f} %" for what, share in record["spent"].items())
    return (
        f"{record['case']}: {record['parameters']:,} parameters ({record['model']}); {SITES} sites "
        f"on {WORKERS} workers of one thread, {settings['steps']} steps per site and round of "
        f"{settings['batch_size']} packed rows of {settings['max_length']} tokens, "
        f"{settings['rounds']} rounds, median of {settings['repeats']}. "
        f"Later rounds, busiest worker: {spent}."
    )


def _verdict(records: Sequence[Mapping[str, Any]]) -> str:
    worst = min(record["ratio_later"] for record in records)
    reads = max(record["base_reads_per_worker"] for record in records)
    return (
        f"Target: at least {TARGET} of bare in later rounds; lowest here {worst:.3f}. "
        f"Base model reads per worker: {reads} (target 1). Both sides had the same losses in the "
        "first round."
    )
