"""Four sites and a strategy over them: honest ones, and ways to spoil what they send."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from flwr.app import Array, Message
from torch import Tensor

from models.layout import Layout
from models.seeds import derive
from strategies import registry
from strategies.config import StrategyConfig
from strategies.exchange import Exchange
from strategies.flower import ComposedStrategy, RoundOutcome
from strategies.messages import SiteOutcome, decode_all, to_record
from strategies.sampling import Selection
from tests.fakes import Answer, FakeGrid, Field, Site

LAYOUT = Layout(("a", "b", "c"), ((2, 3), (4,), ()))
# The same and a pair of LoRA factors, for rules that know them.
PAIRED = Layout(
    (*LAYOUT.names, "m.lora_A.weight", "m.lora_B.weight"), (*LAYOUT.shapes, (2, 5), (6, 2))
)
NODES = {"ann": 907, "bob": 13, "eve": 44, "zoe": 5}
EXAMPLES = {"ann": 120, "bob": 33, "eve": 77, "zoe": 1}
MORE = {"cid": 61, "dee": 7, "fay": 450, "gus": 28}  # for rules that want more than a few
Spoil = Callable[[Answer], Answer]


def honest(site: str) -> Site:
    """Sends an update that depends on site, round and payload, so that a wrong one shows later."""

    def answer(question: Message) -> Iterable[Answer]:
        received = decode_all(question.content.array_records["arrays"])
        plan = question.content.config_records["plan"]
        report: dict[str, object] = {"before-loss-sum": 2.5, "before-counted": 2}
        if question.metadata.message_type == "evaluate":
            yield Answer(report=dict(report))  # type: ignore[arg-type]
            return
        round_ = int(str(plan["round"]))
        generator = torch.Generator().manual_seed(derive(0, site, round_))
        delta = {
            name: torch.randn(tensor.shape, generator=generator) - 0.3 * tensor
            for name, tensor in received.items()
        }
        layout = str(plan["layout"])
        report |= {"round": round_, "layout": layout, "num-examples": EXAMPLES.get(site, 50)}
        yield Answer(dict(to_record(delta)), dict(report))  # type: ignore[arg-type]

    return answer


def spoiling(site: str, spoil: Spoil) -> Site:
    """An honest site whose training replies are spoilt."""

    def answer(question: Message) -> Iterable[Answer]:
        answers = honest(site)(question)
        return map(spoil, answers) if question.metadata.message_type == "train" else answers

    return answer


@dataclass
class Log:
    """A listener that keeps everything."""

    rounds: list[RoundOutcome] = field(default_factory=list)
    evaluations: list[tuple[int, list[SiteOutcome]]] = field(default_factory=list)

    def asked(self, kind: str, round_: int, sites: Sequence[str]) -> None:
        """Nothing to do."""

    def round_finished(self, outcome: RoundOutcome) -> None:
        self.rounds.append(outcome)

    def evaluated(self, round_: int, sites: Sequence[SiteOutcome]) -> None:
        self.evaluations.append((round_, list(sites)))

    def of(self, site: str, round_: int = 1) -> SiteOutcome:
        return next(s for s in self.rounds[round_ - 1].sites if s.site == site)


def federation(*names: str, seed: int = 0, **others: Site) -> FakeGrid:
    """Honest sites by name, and others with the behaviour given."""
    sites = {(NODES | MORE)[name]: honest(name) for name in names or NODES}
    return FakeGrid(sites | {NODES[name]: site for name, site in others.items()}, seed=seed)


@dataclass
class Bench:
    """Runs the strategy over a grid in a folder of its own."""

    folder: Path
    layout: Layout = LAYOUT

    def strategy(
        self,
        log: Log,
        *,
        quorum: float = 0.5,
        selection: Selection | None = None,
        exchange: Exchange | None = None,
        **options: object,
    ) -> ComposedStrategy:
        config = StrategyConfig.model_validate(options)
        own = torch.linspace(1, -1, self.layout.size)
        names = {node: name for name, node in (NODES | MORE).items()}
        return ComposedStrategy(
            config,
            registry.build(config),
            self.layout,
            seed=3,
            quorum=quorum,
            members=lambda grid, done: {names[node]: node for node in grid.get_node_ids()},
            plan=lambda round_, site: {"for": site},
            spool=self.folder / "spool",
            listener=log,
            selection=selection,
            exchange=exchange,
            trusted=(lambda *_: self.layout.unflatten(own)) if config.trusts else None,
        )

    def run(
        self, grid: FakeGrid, rounds: int = 2, timeout: float = 20.0, **options: object
    ) -> tuple[bytes, Log]:
        log = Log()
        strategy = self.strategy(log, **options)  # type: ignore[arg-type]
        started = to_record(start(self.layout))
        result = strategy.start(grid, started, num_rounds=rounds, timeout=timeout)
        return to_bytes(decode_all(result.arrays), self.layout), log


def start(layout: Layout) -> dict[str, Tensor]:
    return layout.unflatten(torch.linspace(-1, 1, layout.size))


def to_bytes(payload: Mapping[str, Tensor], layout: Layout = LAYOUT) -> bytes:
    return layout.flatten(payload).numpy().tobytes()


START = start(LAYOUT)


def with_arrays(change: Callable[[dict[str, Array]], dict[str, Array]]) -> Spoil:
    return lambda answer: replace(answer, arrays=change(dict(answer.arrays or {})))


def with_tensor(name: str, value: Tensor) -> Spoil:
    return with_arrays(lambda arrays: {**arrays, name: to_record({name: value})[name]})


def with_report(**fields: Field) -> Spoil:
    changes = {key.replace("_", "-"): value for key, value in fields.items()}
    return lambda answer: replace(answer, report={**(answer.report or {}), **changes})


def filled(value: float) -> Spoil:
    return with_tensor("b", torch.tensor([0.0, value, 0.0, 0.0]))
