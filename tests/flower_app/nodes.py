"""A worker process with its ClientApp, a tiny model and the rows of three sites."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import ERROR
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from torch import Tensor

from flower_app import client_app, compose
from flower_app.config import defaults, parse
from flower_app.worker import Worker
from models.layout import Layout
from strategies.messages import decode_all, to_record
from tests.fakes import Answer, FakeGrid
from tests.serverpaths import unnamed

NAMES = ("east", "north", "west")
WORDS = (
    "cat", "dog", "bird", "mat", "hat", "sun", "moon", "tree", "lake", "hill", "road", "song",
    "night", "day", "wind",
)  # fmt: skip


def site_rows(name: str, count: int) -> list[dict[str, object]]:
    """Different short sentences of a site, told by its name."""
    return [
        {
            "site": name,
            "text": f"{name} {WORDS[at % 15]} {WORDS[at * 7 % 15]} {WORDS[at * 4 % 15]} {at}",
            "label": at % 3,
        }
        for at in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    """Write a jsonl file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@dataclass
class Nodes:
    """Three sites in one process; `keys` go over the defaults, `extra` over those.

    `errors` is what the operator of a site reads in its log.
    """

    folder: Path
    model: Path
    monkeypatch: pytest.MonkeyPatch
    keys: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    states: dict[str, RecordDict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = {name: site_rows(name, 14 + 4 * at) for at, name in enumerate(NAMES)}
        self.own = {name: str(self.folder / f"{name}.jsonl") for name in NAMES}
        everything = [row for own in rows.values() for row in own]
        # The sites' rows lie mixed in the simulation's file, in the order of each site's own.
        order = sorted(range(len(everything)), key=lambda at: (at * 7) % 5)
        mixed = [everything[at] for at in order]
        source = write_rows(self.folder / "all.jsonl", mixed)
        for name in NAMES:
            mine = [row for row in mixed if row["site"] == name]
            write_rows(Path(self.own[name]), mine)
        self.keys = {
            "run.rounds": 2,
            "model.name": str(self.model),
            "payload.rank": 2,
            "payload.num-virtual-tokens": 3,
            "data.source": source,
            "data.eval-fraction": 0.3,
            "train.steps": 2,
            "train.batch-size": 4,
            "train.max-length": 32,
            "train.threads": 1,
            "train.learning-rate": 0.01,
        }
        self.monkeypatch.setattr(client_app, "log", self._log)
        self.restart()

    def _log(self, level: int, text: str, *values: object) -> None:
        if level >= ERROR:
            self.errors.append(text % values)

    def restart(self) -> Worker:
        """Forget everything, as a new process would."""
        worker = Worker()
        self.monkeypatch.setattr(client_app, "_WORKER", worker)
        return worker

    def flat(self, **extra: Any) -> dict[str, Any]:
        """The run config; `extra` has underscores for dots and dashes: `train__max_length`."""
        given = {k.replace("__", ".").replace("_", "-"): v for k, v in extra.items()}
        flat = defaults() | self.keys | given
        return unnamed(flat) if flat["data.partition"] == "own" else flat

    def simulated(self, partition: int, of: int = 3) -> dict[str, Any]:
        """Node config as Flower's simulation sets it."""
        return {"partition-id": partition, "num-partitions": of}

    def deployed(self, site: str, **extra: str) -> dict[str, Any]:
        """Node config as the operator of a site writes it."""
        given = {key.replace("_", "-"): value for key, value in extra.items()}
        paths = {"data-path": self.own.get(site, ""), "model-path": str(self.model)}
        return {"site": site} | paths | given

    def start(self, **extra: Any) -> dict[str, Tensor]:
        """The payload that the server sends out first."""
        config = parse(self.flat(**extra))
        return compose.attach(config, compose.load_base(config)).select()

    def ask(
        self,
        kind: str,
        node: Mapping[str, Any],
        arrays: Mapping[str, Tensor] | None = None,
        plan: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> RecordDict:
        """Hand a message to the ClientApp and return the content of its reply."""
        content = RecordDict({"plan": ConfigRecord(dict(plan or {}))})
        if arrays is not None:
            content["arrays"] = to_record(arrays)
        return self.hand(kind, node, content, **extra)

    def hand(
        self, kind: str, node: Mapping[str, Any], content: RecordDict, **extra: Any
    ) -> RecordDict:
        """Hand content to the ClientApp as a message of a kind and return that of its reply."""
        metadata = Metadata(1, "question", 1, 2, "", "", 0.0, 1e12, kind)
        # Flower keeps a record for each node until the run ends.
        state = self.states.setdefault(json.dumps(dict(node), sort_keys=True), RecordDict())
        context = Context(1, 2, dict(node), state, self.flat(**extra))
        # Flower itself makes messages of other processes this way; its types show the rest only.
        message: Message = Message(content, metadata=metadata)  # type: ignore[call-overload]
        reply = client_app.app(message, context)
        assert reply.metadata.reply_to_message_id == "question"
        return reply.content

    def grid(self, *configs: Mapping[str, Any], **extra: Any) -> FakeGrid:
        """Flower's grid with a node for each node config, all in this process."""

        def site(node: Mapping[str, Any]) -> Callable[[Message], Iterable[Answer]]:
            def answer(question: Message) -> Iterable[Answer]:
                kind = question.metadata.message_type
                content = self.hand(kind, node, question.content, **extra)
                arrays, (name, report) = content.array_records, *content.config_records.items()
                yield Answer(dict(arrays["arrays"]) if arrays else None, dict(report), name)

            return answer

        return FakeGrid({number: site(node) for number, node in enumerate(configs, 1)})

    def member(self, node: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
        """The answer to a roll call."""
        return dict(self.ask("query", node, **extra).config_records["member"])

    def train(
        self, node: Mapping[str, Any], round_: int = 1, start: Mapping[str, Tensor] | None = None,
        plan: Mapping[str, Any] | None = None, **extra: Any,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
        """Train a round; the delta and the report."""
        arrays = self.start(**extra) if start is None else start
        content = self.ask("train", node, arrays, self.plan(arrays, round_, plan), **extra)
        report = dict(content.config_records["report"])
        if "error" in report:
            return {}, report
        return decode_all(content.array_records["arrays"]), report

    def evaluate(
        self, node: Mapping[str, Any], arrays: Mapping[str, Tensor], round_: int = 0,
        plan: Mapping[str, Any] | None = None, **extra: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Score a payload after `round_` rounds; the report."""
        content = self.ask("evaluate", node, arrays, self.plan(arrays, round_, plan), **extra)
        assert not content.array_records
        return dict(content.config_records["report"])

    def plan(
        self, arrays: Mapping[str, Tensor], round_: int, more: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """What the server says of a round: in a simulation also where the sites keep things."""
        own = {"state": str(self.folder / "sites"), "run": "a-run"}
        return own | {"round": round_, "layout": Layout.of(arrays).digest} | dict(more or {})


def raw(tensors: Mapping[str, Tensor]) -> bytes:
    """All bytes, in order."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).numpy().tobytes()
