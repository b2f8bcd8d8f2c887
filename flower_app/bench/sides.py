"""The sides that `bench aggregation` compares, one measurement to a process.

Run as `python -m flower_app.bench.sides SPECIFICATION`; prints seconds and memory as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flwr_strategy
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from flower_app.bench.byzfl_loader import load_byzfl
from flower_app.bench.memory import forget_peak, peak_bytes
from models.layout import Layout
from strategies import registry
from strategies.cohort import Cohort, LazyRows
from strategies.config import StrategyConfig

Work: TypeAlias = Callable[[], object]
# Makes what one repeat needs, outside the clock, and gives what the clock is to see.
Prepare: TypeAlias = Callable[[], Work]

# Of each rule, the counterpart that a side has, for N sites of which f lie.
FLWR: Mapping[str, Callable[[int, int], Any]] = {
    "mean": lambda n, f: flwr_strategy.FedAvg(),
    "median": lambda n, f: flwr_strategy.FedMedian(),
    "trimmed-mean": lambda n, f: flwr_strategy.FedTrimmedAvg(beta=(f + 0.5) / n),
    "krum": lambda n, f: flwr_strategy.Krum(num_malicious_nodes=f),
    "multi-krum": lambda n, f: flwr_strategy.MultiKrum(
        num_malicious_nodes=f, num_nodes_to_select=n - f
    ),
    "bulyan": lambda n, f: flwr_strategy.Bulyan(num_malicious_nodes=f),
}
BYZFL: Mapping[str, Callable[[Any, int], Any]] = {
    "mean": lambda byzfl, f: byzfl.Average(),
    "median": lambda byzfl, f: byzfl.Median(),
    "trimmed-mean": lambda byzfl, f: byzfl.TrMean(f),
    "krum": lambda byzfl, f: byzfl.Krum(f),
    "multi-krum": lambda byzfl, f: byzfl.MultiKrum(f),
    "geometric-median": lambda byzfl, f: byzfl.GeometricMedian(),
    "centered-clipping": lambda byzfl, f: byzfl.CenteredClipping(),
}
COPY = "copy"
"""Not a rule but the yardstick of the mean: the same bytes copied."""

SIDES = ("ours", "flwr", "byzfl numpy", "byzfl torch")


@dataclass(frozen=True)
class Specification:
    """One measurement: rule `rule` of side `side` on the first `sites` files of `folder`."""

    side: str
    rule: str
    sites: int
    size: int
    byzantine: int
    folder: str
    budget_s: float


@dataclass(frozen=True)
class Measured:
    """Seconds of each repeat after the first, and by how many bytes memory grew at its peak."""

    seconds: list[float]
    grown: int


def has(side: str, rule: str) -> bool:
    """Whether a side has a counterpart of the rule."""
    table = {"ours": registry.RULES, "flwr": FLWR}.get(side, BYZFL)
    return rule in table or (side == "ours" and rule == COPY)


def _mapped(spec: Specification) -> LazyRows:
    """Rows mapped from files anew for each look-up, as the server's spool maps them."""
    files = [str(Path(spec.folder) / f"{i:06d}.f32") for i in range(spec.sites)]
    return LazyRows(
        spec.sites, lambda i: torch.from_file(files[i], size=spec.size, dtype=torch.float32)
    )


def _copy(spec: Specification) -> Prepare:
    """The yardstick of the mean: the same bytes, copied into one buffer row by row."""
    rows, buffer = _mapped(spec), torch.empty(spec.size)

    def copy() -> None:
        for row in rows:
            buffer.copy_(row)

    return lambda: copy


def _ours(spec: Specification) -> Prepare:
    config = StrategyConfig(rule=spec.rule, num_byzantine=spec.byzantine)
    rule, layout = registry.build(config), Layout(("w",), ((spec.size,),))
    rows = _mapped(spec)

    def prepare() -> Work:
        # A new cohort each time: inner products are kept with the cohort.
        deltas = {f"site-{i:04d}": i for i in range(spec.sites)}
        shares_N = torch.full((spec.sites,), 1.0 / spec.sites)
        cohort = Cohort(torch.zeros(spec.size), rows, shares_N, tuple(deltas), layout)
        state = rule.init(spec.size)
        return lambda: rule.apply(state, cohort, torch.Generator())

    return prepare


def _flwr(spec: Specification) -> Prepare:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rows = [row.clone().numpy() for row in _mapped(spec)]
    strategy = FLWR[spec.rule](spec.sites, spec.byzantine)
    # Arrays carry the number of their row and are unpacked to it: ours and byzfl have their rows
    # when the clock starts, so that flwr's clock must not count the unpacking of messages.
    mock.patch.object(Array, "numpy", lambda array: rows[int(array.data)]).start()

    def prepare() -> Work:
        replies = [_reply(number, spec.size) for number in range(spec.sites)]

        def work() -> None:
            if strategy.aggregate_train(1, replies)[0] is None:
                raise RuntimeError("flwr aggregated nothing.")

        return work

    return prepare


def _reply(number: int, size: int) -> Message:
    asked = Message(RecordDict({"config": ConfigRecord()}), number + 1, "train")
    array = Array("float32", (size,), "numpy.ndarray", str(number).encode())
    arrays, metrics = ArrayRecord({"w": array}), MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=asked)


def _byzfl(spec: Specification) -> Prepare:
    aggregate = BYZFL[spec.rule](load_byzfl(), spec.byzantine)
    rows: Sequence[Tensor] = [row.clone() for row in _mapped(spec)]
    given = rows if spec.side == "byzfl torch" else [row.numpy() for row in rows]
    return lambda: lambda: aggregate(given)


def main() -> None:
    """One measurement; see the module's docstring."""
    spec = Specification(**json.loads(sys.argv[1]))
    makers = {COPY: _copy, "ours": _ours, "flwr": _flwr}
    forget_peak()
    before, seconds = peak_bytes(), list[float]()
    prepare = makers.get(COPY if spec.rule == COPY else spec.side, _byzfl)(spec)
    ends = time.perf_counter() + spec.budget_s
    # The first repeat warms up, unless it already takes all the time there is.
    while len(seconds) < 6 and (len(seconds) < 2 or time.perf_counter() < ends):
        work = prepare()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
        if seconds[-1] > spec.budget_s:
            break
    print(json.dumps(asdict(Measured(seconds[1:] or seconds, peak_bytes() - before))))


if __name__ == "__main__":
    main()
