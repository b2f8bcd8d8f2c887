"""A group of sites and a server that sum their updates in one process, honestly or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from privacy.secure import site as steps
from privacy.secure.errors import SecureError
from privacy.secure.fixed_point import Words
from privacy.secure.intake import Answers
from privacy.secure.keys import NodeKey, Pinned
from privacy.secure.server import Summation
from privacy.secure.site import Session
from privacy.secure.terms import Terms
from strategies.exchange import Parcel

NAMES = ("ann", "bob", "cat", "dan", "eve", "fay")
MODEL = b"m" * 32


def terms(names: Sequence[str] = NAMES, size: int = 5, **others: object) -> Terms:
    """Terms of one sum over all the names."""
    plain = Terms("a-run", 1, "group 1", tuple(names), "layout", size, 32, 1.0, "settings")
    return replace(plain, **others)  # type: ignore[arg-type]


def keys(names: Sequence[str] = NAMES) -> dict[str, NodeKey]:
    return {name: NodeKey.simulated(7, name) for name in names}


def update(name: str, size: int) -> np.ndarray:
    """An update that differs from site to site."""
    generator = np.random.default_rng(int.from_bytes(name.encode()[:4]))
    return generator.uniform(-1, 1, size).astype(np.float32)


@dataclass
class Group:
    """Sites with their sessions and a server; a copy goes on from the same point."""

    terms: Terms
    sessions: dict[str, Session] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    masked: dict[str, Words] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = keys(self.terms.members)
        self.pinned = Pinned({name: key.public for name, key in self.keys.items()})
        self.server = Summation(self.terms)
        self.mail: Answers = {}

    def copy(self) -> Group:
        other = copy.copy(self)
        other.sessions, other.refused = dict(self.sessions), dict(self.refused)
        other.masked, other.server = dict(self.masked), copy.deepcopy(self.server)
        return other

    def numbers(self, name: str) -> Words:
        """What a site puts into the sum."""
        return self.terms.numbers.encode(update(name, self.terms.size), 3, 4)[0]

    def all_but(self, gone: Collection[str], step: Callable[[str], Parcel]) -> Answers:
        """The answers of those who were asked and are not gone; a refusal is an answer too."""
        answers: dict[str, Parcel] = {}
        for name in self.mail or self.terms.members:
            if name in gone:
                continue
            try:
                answers[name] = step(name)
            except SecureError as error:
                self.refused[name] = str(error)
                answers[name] = {"error": str(error)}
        return answers

    def advertise(self, gone: Collection[str] = ()) -> Group:
        def step(name: str) -> Parcel:
            self.sessions[name], answer = steps.advertise(self.terms, name, 3, self.keys[name])
            return answer

        self.mail = self.server.advertised(self.all_but(gone, step))
        return self

    def share(self, gone: Collection[str] = ()) -> Group:
        def step(name: str) -> Parcel:
            self.sessions[name], answer = steps.share(
                self.sessions[name], self.mail[name], self.keys[name], self.pinned
            )
            return answer

        self.mail = self.server.shared(self.all_but(gone, step))
        return self

    def mask(self, gone: Collection[str] = (), models: Mapping[str, bytes] | None = None) -> Group:
        def step(name: str) -> Parcel:
            model = (models or {}).get(name, MODEL)
            self.sessions[name], self.masked[name] = steps.mask(
                self.sessions[name], self.mail[name], self.numbers(name), model, self.pinned
            )
            return {"masked": self.terms.numbers.pack(self.masked[name])}

        for name, answer in self.all_but(gone, step).items():
            if isinstance(data := answer.get("masked"), bytes):
                self.server.add(name, data)
        self.mail = self.server.survivors()
        return self

    def confirm(self, gone: Collection[str] = ()) -> Group:
        def step(name: str) -> Parcel:
            self.sessions[name], answer = steps.confirm(
                self.sessions[name], self.mail[name], self.keys[name]
            )
            return answer

        self.mail = self.server.confirmed(self.all_but(gone, step))
        return self

    def opened(self, gone: Collection[str] = ()) -> Words:
        def step(name: str) -> Parcel:
            return steps.unmask(self.sessions[name], self.mail[name], self.pinned)

        return self.server.opened(self.all_but(gone, step), MODEL)

    def plain(self, names: Collection[str]) -> Words:
        """The sum that the server should have, added up in the open."""
        total = np.zeros(self.terms.numbers.length(self.terms.size), self.terms.numbers.dtype)
        for name in names:
            total = total + self.numbers(name)
        return self.terms.numbers.reduced(total)
