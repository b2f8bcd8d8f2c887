"""Split training against central training: time, schedules, bytes, and a long way between sides.

The server, every site and the central side are processes of their own; server and sites speak over
the app's stream, TLS included, on loopback. Both sides of a ratio are measured in turn on the same
cores, given in the table, which server and sites share. Medians over repeats.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flower_app.bench.bases import Shape, save_base
from flower_app.bench.output import Outcome, Progress, table
from flower_app.bench.proxy import DelayingProxy
from flower_app.bench.splitside import ROLES, Task, write_identities
from models.split.wire import token_bytes

WIDE = Shape("wide", 512, 8, 8, 8, 1536, 2048)
NARROW = Shape("narrow", 128, 3, 4, 4, 384, 2048)
"""Small, so that time is spent on the way and not in the model."""

SITES = 8
ROUND_TRIP_S = 0.05
IN_FLIGHT = (1, 4, 8)
WIRES = ("bf16", "int8", "int4")
TARGETS = {
    "central": "at most 1.2", "joined": "above 1.41", "4 in flight": "at least 3",
    "bf16": "at most 1.02", "int8": "at most 0.52",
}  # fmt: skip
_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "OMP_WAIT_POLICY": "passive"}  # fmt: skip

Record = dict[str, Any]


class Side:
    """A process with one role, which does tasks as it is told."""

    def __init__(self, role: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flower_app.bench.splitside", role, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_THREADS},
        )
        self._role = role

    def ready(self) -> None:
        """Wait until it has read its model."""
        self._line("ready")

    def __call__(self, task: Task, **given: Any) -> Record:
        """What came of a task; raises RuntimeError where the process ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": asdict(task), **given}) + "\n")
        self._process.stdin.flush()
        found: Record = json.loads(self._line("{"))
        return found

    def _line(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError(f"Expected an answer of the side {self._role!r}, but it ended.")

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Bench:
    """The three sides, with one model."""

    def __init__(self, sides: dict[str, Side]) -> None:
        self._sides = sides

    def central(self, task: Task) -> Record:
        """Training of the whole model."""
        return self._sides["central"](task)

    def split(self, task: Task, round_trip_s: float | None = None) -> Record:
        """Training across the cut; with a round trip, through the proxy, which counts bytes."""
        port = self._sides["server"](task)["port"]
        with ExitStack() as stack:
            proxy = None
            if round_trip_s is not None:
                proxy = stack.enter_context(DelayingProxy(port, round_trip_s))
            found = self._sides["sites"](task, port=proxy.port if proxy else port)
        served = self._sides["server"](task)
        if served["dropped"]:
            raise RuntimeError(f"Expected all sites to finish, got {served['dropped']}.")
        found["server_cpu"] = served["cpu"] * task.steps / (task.steps + 1)  # warming up left out
        found["cpu"] += found["server_cpu"]
        found["joined"] = served["joined"]
        found["line"] = proxy.passed if proxy else 0
        return found


@contextmanager
def bench(shape: Shape) -> Iterator[Bench]:
    """The sides, ready to work."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="florilegium-bench-")))
        save_base(folder / "model", shape, ["rows of random tokens need no text"])
        write_identities(folder, ["server", *(f"site {number}" for number in range(SITES))])
        sides = {role: Side(role, folder) for role in ROLES}
        for side in sides.values():
            stack.callback(side.stop)
        for side in sides.values():
            side.ready()
        yield Bench(sides)


def measure(quick: bool) -> Outcome:
    """All comparisons, one after another."""
    say, repeats = Progress(), 1 if quick else 3
    cores = sorted(os.sched_getaffinity(0))[:2]
    records: list[Record] = []
    with bench(WIDE) as wide:
        for count in range(1, 2 if quick else len(cores) + 1):
            say(f"against central training, {count} cores ...")
            records.append(against_central(wide, cores[:count], quick, repeats))
        say(f"{SITES} sites ...")
        records += schedules(wide, cores, quick, repeats)
        say("bytes ...")
        records += [size(wide, cores, wire) for wire in WIRES]
    with bench(NARROW) as narrow:
        say(f"a round trip of {1000 * ROUND_TRIP_S:.0f} ms ...")
        records += far(narrow, cores, quick)
    return Outcome(_text(records), records)


def against_central(on: Bench, cores: Sequence[int], quick: bool, repeats: int) -> Record:
    """One site by turns, and the whole model, both with as many threads as there are cores."""
    task = Task(
        cores, steps=1 if quick else 3, micro=2, rows=1 if quick else 2, tokens=128,
        hidden=WIDE.hidden, threads=len(cores), site_threads=len(cores),
    )  # fmt: skip
    pairs = [(on.central(task), on.split(task)) for _ in range(repeats)]
    apart = abs(pairs[0][0]["loss"] - pairs[0][1]["loss"])
    assert apart < 0.05, f"the first step's losses are {apart} apart: the sides differ"
    central, across = ([pair[at] for pair in pairs] for at in (0, 1))
    return {
        "what": "central",
        "cores": len(cores),
        "ratio": _median(across, "seconds") / _median(central, "seconds"),
        "cpu_ratio": _median(across, "cpu") / _median(central, "cpu"),
        "tokens_per_s": [_pace(central), _pace(across)],
        "runs": pairs,
    }


def schedules(on: Bench, cores: Sequence[int], quick: bool, repeats: int) -> list[Record]:
    """Sites with small batches: by turns, joined, and joined on two replicas."""
    turns = Task(
        cores, 1 if quick else 3, micro=2, rows=1, tokens=32, hidden=WIDE.hidden, sites=SITES
    )
    ways = {
        "turns": turns,
        "joined": replace(turns, schedule="client-batch"),
        "replicas": replace(turns, schedule="hierarchical", replicas=2),
    }
    found: dict[str, list[Record]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, task in ways.items():
            run = on.split(task)
            if way == "turns":  # all but the first site's warming up comes after the clock started
                run["tokens"] = run["tokens"] * (1 + 1 / task.steps)
                run["tokens"] -= task.micro * task.rows * task.tokens
            found[way].append(run)
    paces = {way: _pace(runs) for way, runs in found.items()}
    return [
        {
            "what": way,
            "tokens_per_s": [paces["turns"], paces[way]],
            "ratio": paces[way] / paces["turns"],
            "cpu_ratio": _spent(found["turns"]) / _spent(found[way]),
            "joined": _median(found[way], "joined"),
            "runs": found[way],
        }
        for way in ways
    ]


def size(on: Bench, cores: Sequence[int], wire: str) -> Record:
    """Bytes of a token there and back, in frames and on the line, over the floor of bf16."""
    task = Task(cores, 1, micro=2, rows=1, tokens=128, hidden=WIDE.hidden, wire=wire)
    run = on.split(task, round_trip_s=0.0)
    floor = 4 * token_bytes("bf16", WIDE.hidden)
    whole = run["tokens"] * (1 + 1 / task.steps)  # the proxy saw the warming up and the handshake
    return {
        "what": wire,
        "frames": run["bytes"] / run["tokens"] / floor,
        "line": run["line"] / whole / floor,
        "floor": floor,
        "bytes_per_token": run["bytes"] / run["tokens"],
    }


def far(on: Bench, cores: Sequence[int], quick: bool) -> list[Record]:
    """Throughput of one site by the number of micro-batches in flight."""
    micro = 8 if quick else 24
    task = Task(cores, 1 if quick else 2, micro=micro, rows=1, tokens=16, hidden=NARROW.hidden)
    records: list[Record] = []
    for count in IN_FLIGHT:
        run = on.split(replace(task, in_flight=count), round_trip_s=ROUND_TRIP_S)
        pace = run["tokens"] / run["seconds"]
        first = records[0]["tokens_per_s"][1] if records else pace
        records.append(
            {
                "what": f"{count} in flight",
                "tokens_per_s": [first, pace],
                "ratio": pace / first,
                "runs": [run],
            }
        )
    return records


def _median(runs: Sequence[Record], key: str) -> float:
    return statistics.median(float(run[key]) for run in runs)


def _pace(runs: Sequence[Record]) -> float:
    return statistics.median(float(run["tokens"] / run["seconds"]) for run in runs)


def _spent(runs: Sequence[Record]) -> float:
    """Processor time of a step of all sites, server and sites together."""
    return statistics.median(float(run["cpu"]) for run in runs)


def _text(records: Sequence[Record]) -> str:
    columns = ("comparison", "without", "with", "ratio", "target")
    return "\n\n".join(
        [
            table(columns, [_row(record) for record in records]),
            "without, with: tokens per second, medians. LoRA of rank 8 in all parts, one block in\n"
            "head and in tail, AdamW, float32, bf16 on the line. Server, sites and central\n"
            "training are processes of their own, on the same cores for both sides of a ratio.\n"
            f"Central: {WIDE};\n"
            "2 rows of 128 tokens, 2 micro-batches a step, 2 in flight; central, server and site\n"
            "with a thread per core each. The ratio is of time, CPU that of processor time.\n"
            f"Sites: {SITES} processes with 1 row of 32 tokens, 2 micro-batches a step; each with\n"
            "one thread, as each replica. Bytes: of frames, over 4 x hidden x 2 a token; on the\n"
            "line with TLS and HTTP/2, the handshake included.\n"
            f"In flight: {NARROW};\n"
            f"1 row of 16 tokens, {1000 * ROUND_TRIP_S:.0f} ms there and back by a delaying proxy.",
        ]
    )


def _row(record: Record) -> list[str]:
    what = record["what"]
    target = TARGETS.get(what, "")
    if what in WIRES:
        ratio = f"{record['frames']:.4f} ({record['line']:.4f} on the line)"
        floor, spent = str(record["floor"]), f"{record['bytes_per_token']:.0f}"
        return [f"bytes a token, {what}, over the floor of bf16", floor, spent, ratio, target]
    names = {
        "turns": f"{SITES} sites by turns",
        "joined": f"{SITES} sites joined, over by turns",
        "replicas": f"{SITES} sites on 2 replicas, over by turns",
        "central": f"time split over central, {record.get('cores')} core(s)",
    }
    ratio = f"{record['ratio']:.2f}"
    if "cpu_ratio" in record:
        ratio += f" (CPU {record['cpu_ratio']:.2f})"
    first, second = (f"{pace:,.0f}" for pace in record["tokens_per_s"])
    return [names.get(what, f"{what}, over 1"), first, second, ratio, target]
