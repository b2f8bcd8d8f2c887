"""Peak memory of the server while it gates and averages the replies of a round.

Each number of sites is measured in a fresh process, and a reply is made only when the server asks
for the next one, so that what grows is the server's own memory. Replies wait on disk.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from flower_app.bench.output import Outcome, Progress, table
from models.layout import Layout
from strategies import registry
from strategies.config import StrategyConfig
from strategies.flower import ComposedStrategy, RoundOutcome
from strategies.messages import SiteOutcome, to_record

SIZE = 10_000_000
TENSORS = 10
SITES = (4, 16, 64)
ALLOWED = 1.05
"""Peak with the most sites over the peak with the fewest that still counts as no growth."""


@dataclass(frozen=True)
class Peak:
    """Peak resident bytes of a process before and after the aggregation, and its seconds."""

    sites: int
    admitted: int
    before: int
    after: int
    seconds: float


@dataclass
class _Listener:
    admitted: int = 0

    def asked(self, kind: str, round_: int, sites: Sequence[str]) -> None:
        """Nothing to do."""

    def round_finished(self, outcome: RoundOutcome) -> None:
        """Count who was admitted."""
        self.admitted = sum(site.status == "ok" for site in outcome.sites)

    def evaluated(self, round_: int, sites: Sequence[SiteOutcome]) -> None:
        """Nothing is evaluated here."""


def measure(quick: bool) -> Outcome:
    """Aggregate updates of `SIZE` numbers from 4, 16 and 64 sites, each in a process of its own."""
    size = SIZE // 10 if quick else SIZE
    say = Progress()
    peaks: list[Peak] = []
    for sites in SITES:
        say(f"{sites} sites, {size:,} numbers each ...")
        command = [sys.executable, "-m", "flower_app.bench.memory", str(sites), str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        peaks.append(Peak(**json.loads(done.stdout.splitlines()[-1])))
    return Outcome(_text(peaks, size), [{"size": size, **asdict(peak)} for peak in peaks])


def aggregate(sites: int, size: int) -> Peak:
    """Gate and average the updates of `sites` sites in this process."""
    # Messages carry who sends them in which run.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    side = size // TENSORS
    layout = Layout(tuple(f"tensor-{i}" for i in range(TENSORS)), ((side,),) * TENSORS)
    members = {f"site-{number:04d}": number + 1 for number in range(sites)}
    settings = StrategyConfig()
    listener = _Listener()
    with tempfile.TemporaryDirectory(prefix="florilegium-bench-") as folder:
        strategy = ComposedStrategy(
            settings,
            registry.build(settings),
            layout,
            seed=0,
            quorum=1.0,
            members=lambda grid, done: members,
            plan=lambda round_, site: {},
            spool=Path(folder),
            listener=listener,
        )
        arrays = to_record({name: torch.zeros(side) for name in layout.names})
        no_grid = cast(Grid, None)  # only handed on to `members`
        asked = list(strategy.configure_train(1, arrays, ConfigRecord(), no_grid))
        forget_peak()
        before, started = peak_bytes(), time.perf_counter()
        strategy.aggregate_train(1, _replies(asked, layout))
        seconds = time.perf_counter() - started
    return Peak(sites, listener.admitted, before, peak_bytes(), seconds)


def _replies(asked: Sequence[Message], layout: Layout) -> Iterator[Message]:
    """A well-formed reply to each message, made when it is asked for."""
    noise = layout.unflatten(torch.randn(layout.size, generator=torch.Generator().manual_seed(0)))
    for number, message in enumerate(asked, start=1):
        update = {name: tensor * (1e-3 * number) for name, tensor in noise.items()}
        report = ConfigRecord({"round": 1, "layout": layout.digest, "num-examples": 100})
        yield Message(RecordDict({"arrays": to_record(update), "report": report}), reply_to=message)


def forget_peak() -> None:
    """Let the peak start again from the memory in use now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most resident memory of this process since its peak was last forgotten."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _text(peaks: Sequence[Peak], size: int) -> str:
    mib = 2**20
    rows = [
        [
            str(peak.sites),
            str(peak.admitted),
            f"{peak.before / mib:.0f}",
            f"{peak.after / mib:.0f}",
            f"{(peak.after - peak.before) / mib:.0f}",
            f"{4 * size * peak.sites / mib:.0f}",
            f"{peak.seconds:.1f}",
        ]
        for peak in peaks
    ]
    columns = (
        "sites", "admitted", "MiB before", "peak MiB", "grown by", "all updates", "seconds"
    )  # fmt: skip
    growth = peaks[-1].after / peaks[0].after
    verdict = "does not grow" if growth <= ALLOWED else "GROWS"
    return (
        f"{table(columns, rows)}\n\nMean of updates of {size:,} float32 numbers "
        f"({4 * size / mib:.0f} MiB each). Peak memory {verdict} with the number of sites: "
        f"{peaks[-1].sites} sites take {growth:.3f} of what {peaks[0].sites} take."
    )


if __name__ == "__main__":
    print(json.dumps(asdict(aggregate(int(sys.argv[1]), int(sys.argv[2])))))
