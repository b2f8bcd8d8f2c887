"""Flower's Grid in memory: sites that answer at once, late, twice, wrongly or never."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Site = Callable[[Message], Iterable["Answer"]]
Field = bool | int | float | str | bytes | list[int] | list[str]


@dataclass
class Answer:
    """What a site sends back, before it becomes a message; tests spoil it.

    `late` counts how often the server looks before it is there; `node` is the sender, by default
    the one that was asked.
    """

    arrays: dict[str, Array] | None = None
    report: dict[str, Field] | None = None
    record: str = "report"
    error: Error | None = None
    more: dict[str, ArrayRecord | ConfigRecord] = field(default_factory=dict)
    late: int = 0
    node: int | None = None

    def message(self, question: Message) -> Message:
        """The reply to `question`."""
        if self.error is not None:
            reply = Message(self.error, reply_to=question)
        else:
            content = RecordDict(dict(self.more))
            if self.arrays is not None:
                content["arrays"] = ArrayRecord(dict(self.arrays))
            if self.report is not None:
                content[self.record] = ConfigRecord(dict(self.report))
            reply = Message(content, reply_to=question)
        if self.node is not None:
            reply.metadata.__dict__["_src_node_id"] = self.node
        return reply


@dataclass
class FakeGrid(Grid):
    """Node id -> site. Replies that are due come in an order drawn from `seed`."""

    sites: dict[int, Site]
    seed: int = 0
    unsendable: frozenset[int] = frozenset()
    questions: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self._waiting: dict[str, list[tuple[int, Message]]] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        nodes = list(self.sites)
        self._draw.shuffle(nodes)
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = []
        for message in messages:
            name = f"message-{len(self.questions)}"
            message.metadata.__dict__["_message_id"] = name
            self.questions.append(message)
            node = message.metadata.dst_node_id
            if node in self.unsendable or node not in self.sites:
                continue
            sent.append(name)
            answers = self.sites[node](message)
            self._waiting[name] = [(answer.late, answer.message(message)) for answer in answers]
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        due: list[Message] = []
        for name in message_ids:
            held = self._waiting.get(name, [])
            due += [message for late, message in held if late <= 0]
            self._waiting[name] = [(late - 1, message) for late, message in held if late > 0]
        self._draw.shuffle(due)
        return due

    def asked(self, kind: str) -> list[int]:
        """Nodes that were sent messages of a type, in order."""
        return [q.metadata.dst_node_id for q in self.questions if q.metadata.message_type == kind]


@contextmanager
def at_the_server() -> Iterator[None]:
    """Be the process of a ServerApp, which is who Flower lets write messages to sites."""
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = 1, 1, 1
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def silent(question: Message) -> Iterable[Answer]:
    """A site that never answers."""
    return ()


def plan_of(question: Message) -> Mapping[str, object]:
    """The plan in a message to a site."""
    return dict(question.content.config_records["plan"])
