"""Flower's messages: tensors into records and back, replies as they come, a reply taken apart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from models.wire import RawArray, decode, encode
from strategies.exchange import Parcel, nbytes
from strategies.gate import Reply

Scalar = bool | int | float | str
_STYPE = "florilegium.raw"  # little-endian bytes: Flower's own numpy format has no bfloat16
_POLL_S = 0.2
_LONGEST = 2000  # characters of a site's reason that are kept


@dataclass(frozen=True)
class SiteOutcome:
    """What one asked site answered in a round; bytes of payload, update and exchange."""

    site: str
    status: Literal["ok", "quarantined", "screened", "failed", "missing"]
    reason: str
    report: Mapping[str, Scalar]
    bytes_down: int
    bytes_up: int


class Traffic:
    """Bytes that an exchange's own parcels cost each site in a round."""

    def __init__(self) -> None:
        self.down: Counter[str] = Counter()
        self.up: Counter[str] = Counter()

    def sent(self, parcels: Mapping[str, Parcel]) -> None:
        """Count what sites are told."""
        self.down.update({site: nbytes(parcel) for site, parcel in parcels.items()})

    def added(self, outcomes: Iterable[SiteOutcome]) -> tuple[SiteOutcome, ...]:
        """Outcomes with these bytes on top of theirs."""
        down, up = self.down, self.up
        return tuple(
            replace(o, bytes_down=o.bytes_down + down[o.site], bytes_up=o.bytes_up + up[o.site])
            for o in outcomes
        )


def relabelled(
    outcomes: tuple[SiteOutcome, ...],
    reasons: Mapping[str, str],
    status: Literal["failed", "screened"],
) -> tuple[SiteOutcome, ...]:
    """Outcomes with another status for sites that answered well and have a reason for it."""
    return tuple(
        replace(o, status=status, reason=reasons[o.site])
        if o.status == "ok" and o.site in reasons
        else o
        for o in outcomes
    )


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Pack named tensors into an ArrayRecord of raw bytes, in order."""
    return pack({name: encode(tensor) for name, tensor in tensors.items()})


def pack(arrays: Mapping[str, RawArray]) -> ArrayRecord:
    """Raw arrays as an ArrayRecord, in order, as they are."""
    return ArrayRecord({n: Array(r.dtype, r.shape, _STYPE, r.data) for n, r in arrays.items()})


def from_record(record: ArrayRecord) -> dict[str, RawArray]:
    """Take the raw arrays out of an ArrayRecord, unchecked."""
    return {
        name: RawArray(array.dtype, tuple(array.shape), array.data)
        for name, array in record.items()
    }


def arrays_of(content: RecordDict, name: str = "arrays") -> ArrayRecord:
    """The ArrayRecord `name` of a message; an empty one where there is none.

    Flower's own `content.array_records` and `config_records` are reference cycles, which keep a
    whole message in memory until Python next looks for cycles: with a large model loaded that is
    many messages later, and the server's memory would grow with the number of sites.
    """
    record = content.get(name)
    return record if isinstance(record, ArrayRecord) else ArrayRecord()


def config_of(content: RecordDict, name: str) -> ConfigRecord:
    """The ConfigRecord `name` of a message; an empty one where there is none."""
    record = content.get(name)
    return record if isinstance(record, ConfigRecord) else ConfigRecord()


def decode_all(record: ArrayRecord) -> dict[str, Tensor]:
    """Tensors of an ArrayRecord by name; raises WireError for bytes that do not fit."""
    return {name: decode(raw) for name, raw in from_record(record).items()}


def collect(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Push messages and yield the replies as they come, for at most `timeout` seconds."""
    yield from gather(grid, filter(None, grid.push_messages(messages)), timeout)


def gather(grid: Grid, message_ids: Iterable[str], timeout: float) -> Iterator[Message]:
    """Yield the replies to messages as they come, for at most `timeout` seconds; 0 looks once."""
    waiting = set(message_ids)
    deadline = time.monotonic() + timeout
    while waiting:
        for message_id in sorted(waiting):
            # One at a time: Flower holds all that it pulls at once, which may be N whole models.
            for reply in grid.pull_messages([message_id]):
                waiting.discard(message_id)
                yield reply
        left = deadline - time.monotonic()
        if left <= 0:
            return
        if waiting:
            time.sleep(min(_POLL_S, left))


def ask_sites(
    grid: Grid,
    nodes: Mapping[str, int],
    plan: Callable[[str], Mapping[str, Scalar]],
    traffic: Traffic,
    step: str,
    parcels: Mapping[str, Parcel],
    timeout: float,
) -> dict[str, Parcel]:
    """Ask sites a question of an exchange; the first answer of each that gave one in time.

    `traffic` counts both ways.
    """
    sites = {node: site for site, node in nodes.items() if site in parcels}

    def message(site: str) -> Message:
        content = RecordDict({"plan": ConfigRecord(dict(plan(site)))})
        content["parcel"] = ConfigRecord(dict(parcels[site]))
        return Message(content, nodes[site], f"{MessageType.QUERY}.{step}", group_id=step)

    traffic.sent(parcels)
    answers: dict[str, Parcel] = {}
    for reply in collect(grid, [message(site) for site in sorted(parcels)], timeout):
        if site := sites.get(reply.metadata.src_node_id):
            answer = _answer(reply)
            answers.setdefault(site, answer)
            traffic.up[site] += nbytes(answer)
    return answers


def _answer(message: Message) -> Parcel:
    """A site's answer to a question of the exchange; its `error` says why there is none."""
    if message.has_error():
        reason = message.error.reason or f"Flower's error code {message.error.code}"
        return {"error": reason[:_LONGEST]}
    answer = dict(config_of(message.content, "answer").items())
    if told := answer.get("error"):
        return {"error": str(told)[:_LONGEST]}
    return answer


def read_reply(site: str, message: Message, bytes_down: int) -> tuple[SiteOutcome, Reply | None]:
    """Take a reply apart without trusting it; no Reply when the site says that it failed."""
    if message.has_error():
        reason = message.error.reason or f"Flower's error code {message.error.code}"
        return SiteOutcome(site, "failed", reason[:_LONGEST], {}, bytes_down, 0), None
    content = message.content
    arrays = from_record(arrays_of(content))
    record = config_of(content, "report")
    report = {k: v for k, v in record.items() if isinstance(v, (bool, int, float, str))}
    size = sum(len(raw.data) for raw in arrays.values())
    if error := report.get("error"):
        return SiteOutcome(site, "failed", str(error)[:_LONGEST], report, bytes_down, size), None
    reply = Reply(
        site=site,
        round=report.get("round"),
        layout_digest=report.get("layout"),
        num_examples=report.get("num-examples"),
        arrays=arrays,
        nbytes=_nbytes(content),
    )
    return SiteOutcome(site, "ok", "", report, bytes_down, size), reply


def _nbytes(content: RecordDict) -> int:
    """About how much a message holds; Flower's own count fails on an empty string or list."""
    return sum(
        len(key) + (len(value.data) if isinstance(value, Array) else len(str(value)))
        for record in content.values()
        for key, value in record.items()
    )
