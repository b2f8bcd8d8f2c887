"""Secure aggregation against the plain round: seconds and bytes per site, and AES's own speed.

Every site takes every step of the protocol, in one process of one thread, whose CPU time counts.
Bytes are those of all values that a site is sent or sends for a sum, as a run counts them; Flower's
messages around them, of which a secure round has four more per site, with the names of their
fields, are left out. A twentieth of the sites drops out before sending.
"""

from __future__ import annotations

import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from flower_app.bench import encrypted
from flower_app.bench.output import Outcome, Progress, table
from models.layout import Layout
from models.wire import encode
from privacy.secure import site as steps
from privacy.secure.intake import Answers, invited
from privacy.secure.keys import NodeKey, Pinned
from privacy.secure.masks import keystream_rate
from privacy.secure.server import Summation
from privacy.secure.terms import Terms
from strategies.exchange import Parcel, nbytes

TARGET = 1.3
REACH = 0.1
TIMED = ("plain", "keys", "encode", "mask", "keystream")
MODEL = bytes(32)
T = TypeVar("T")


@dataclass
class Bench:
    """One sum over all sites: seconds by step, and bytes to and from all sites."""

    terms: Terms
    update: torch.Tensor
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    down: int = 0
    up: int = 0

    def __post_init__(self) -> None:
        self.keys = {name: NodeKey.simulated(0, name) for name in self.terms.members}
        self.pinned = Pinned({name: key.public for name, key in self.keys.items()})
        self.server = Summation(self.terms)
        self.sessions: dict[str, steps.Session] = {}
        self.mail: Answers = {}

    def timed(self, step: str, work: Callable[..., T], *arguments: object) -> T:
        """Run `work` and add its time to that of `step`."""
        started = time.process_time()
        result = work(*arguments)
        self.seconds[step] += time.process_time() - started
        return result

    def step(
        self,
        name: str,
        site: Callable[[str], tuple[steps.Session, Parcel]],
        server: Callable[[Answers], Answers],
    ) -> None:
        """One step of all sites, and the server's after it."""
        answers: dict[str, Parcel] = {}
        for site_name in self.mail:
            self.sessions[site_name], answers[site_name] = self.timed(name, site, site_name)
        self.up += sum(map(nbytes, answers.values()))
        self.deliver(self.timed("server", server, answers))

    def deliver(self, mail: Answers) -> None:
        """Count what travels to the sites."""
        self.down += sum(map(nbytes, mail.values()))
        self.mail = mail

    def run(self) -> NDArray[np.float32]:
        """All five steps; the mean that comes out."""
        keys, pinned, held = self.keys, self.pinned, self.sessions
        self.deliver(invited(self.terms))
        self.step(
            "keys",
            lambda n: steps.advertise(self.terms, n, 100, keys[n]),
            self.server.advertised,
        )
        self.step(
            "keys",
            lambda n: steps.share(held[n], self.mail[n], keys[n], pinned),
            self.server.shared,
        )
        for name in set(self.mail) - set(self.terms.members[::20]):  # the others drop out
            self.send(name)
        self.deliver(self.timed("server", self.server.survivors))
        self.step(
            "keys", lambda n: steps.confirm(held[n], self.mail[n], keys[n]), self.server.confirmed
        )
        answers = {
            n: self.timed("keys", steps.unmask, held[n], self.mail[n], pinned) for n in self.mail
        }
        self.up += sum(map(nbytes, answers.values()))
        total = self.timed("server", self.server.opened, answers, MODEL)
        return self.terms.numbers.decode(total, self.server.roster.scale)[0]

    def send(self, name: str) -> None:
        """A site's update, from numbers to bytes behind masks."""
        numbers, session = self.terms.numbers, self.sessions[name]
        words, _ = self.timed(
            "encode", numbers.encode, self.update.numpy(), 100, session.known.scale
        )
        session, hidden = self.timed(
            "mask", steps.mask, session, self.mail[name], words, MODEL, self.pinned
        )
        data = self.timed("encode", numbers.pack, hidden)
        self.sessions[name] = session
        self.up += len(data)
        self.timed("server", self.server.add, name, data)


def measure(quick: bool) -> Outcome:
    """100 sites of a million numbers each, of 32 and 16 bits, behind masks and in ciphertexts."""
    say = Progress()
    sites, size = (20, 100_000) if quick else (100, 1_000_000)
    rate = keystream_rate(64 << 20)
    records = []
    for bits in (32, 16):
        say(f"{sites} sites, {size:,} numbers of {bits} bits ...")
        records.append({"bits": bits, **_round(sites, size, bits, rate)})
    text, found = _text(records, sites, size, rate), list(records)
    if importlib.util.find_spec("tenseal") is None:
        return Outcome(f"{text}\n\nWithout CKKS, for want of ./scripts/setup ckks.", found)
    for bits in (32, 16):
        say(f"{sites} sites, {size:,} numbers of {bits} bits in ciphertexts ...")
        found.append({"bits": bits, **encrypted.measured(terms(sites, size, bits), REACH)})
    return Outcome(f"{text}\n\n{encrypted.text(found[len(records) :])}", found)


def terms(sites: int, size: int, bits: int) -> Terms:
    """One sum of all sites."""
    names = tuple(f"site {number:03d}" for number in range(sites))
    layout = Layout(("weight",), ((size,),))
    return Terms("bench", 1, "group 1", names, layout.digest, size, bits, REACH, "settings")


def _round(sites: int, size: int, bits: int, rate: float) -> dict[str, Any]:
    agreed = terms(sites, size, bits)
    update = 0.01 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    bench = Bench(agreed, update)
    _check(bench.run(), update, agreed.numbers.step)
    sent = len(bench.server.active)
    plain = 8 * size  # float32 to a site and back
    secure = 4 * size + bench.down / sites + bench.up / sent
    masks = sites * size * agreed.numbers.dtype.itemsize  # bytes of masks that one site adds
    seconds = bench.seconds
    return {
        "sites": sites,
        "size": size,
        "dropped": sites - sent,
        "bytes_plain": plain,
        "bytes_secure": secure,
        "overhead": secure / plain,
        "plain_s": _best(lambda: encode(update)),
        "keys_s": seconds["keys"] / sites,
        "encode_s": seconds["encode"] / sent,
        "mask_s": seconds["mask"] / sent,
        "server_s": seconds["server"],
        "keystream_s": masks / rate,
    }


def _check(mean_D: NDArray[np.float32], update: torch.Tensor, step: float) -> None:
    """All sites sent the same update, which is their mean; a bench of a wrong sum is none."""
    cut = update.clamp(-REACH, REACH).numpy()
    assert float(np.abs(mean_D - cut).max()) <= 2 * step, "the sum is not that of the updates"


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def _text(records: list[dict[str, Any]], sites: int, size: int, rate: float) -> str:
    columns = (
        "bits", "MB plain", "MB secure", "ratio", "plain ms", "keys ms", "encode ms", "mask ms",
        "AES ms", "mask / AES", "server s",
    )  # fmt: skip
    rows = [
        [
            str(r["bits"]),
            f"{r['bytes_plain'] / 1e6:.2f}",
            f"{r['bytes_secure'] / 1e6:.2f}",
            f"{r['overhead']:.3f}",
            *(f"{1000 * r[f'{work}_s']:.1f}" for work in TIMED),
            f"{r['mask_s'] / r['keystream_s']:.2f}",
            f"{r['server_s']:.1f}",
        ]
        for r in records
    ]
    return "\n".join(
        [
            table(columns, rows),
            "",
            f"{sites} sites, {size:,} numbers, one sum, one thread. MB: to a site and back, per\n"
            "round: the model, the update, and the values of all messages that the sum takes,\n"
            f"without Flower's framing of them (target: at most {TARGET} of plain). ms: CPU time\n"
            "at one site. keys: advertising, sharing, confirming, opening. AES: what AES-256-CTR\n"
            "takes for the bytes of one site's masks, at the "
            f"{rate / 1e9:.2f} GB/s that it reached here.",
        ]
    )
