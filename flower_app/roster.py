"""The roll call: which site sits behind which node id, and may it take part."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flower_app.node import versions
from models.section import ConfigError
from strategies.messages import config_of, gather

_LONGEST = 2000  # characters of a text that a site sends
_NAME = 200  # characters of its name


@dataclass(frozen=True)
class Refused:
    """Why a node takes no part, and the name it gave, if any."""

    reason: str
    site: str = ""


@dataclass(frozen=True)
class Member:
    """A site as it presented itself; `rows` and `held_out` count examples.

    `candidates` are the most answers that a held-out row has to choose from.
    """

    site: str
    node_id: int
    rows: int
    held_out: int
    simulated: bool
    partitions: int
    versions: str
    candidates: int = 0


class _Answer(BaseModel):
    """What a site says of itself, not trusted: types are checked and nothing is converted."""

    model_config = ConfigDict(strict=True)

    site: str = Field(min_length=1, max_length=_NAME, pattern=r"\S")
    rows: int = Field(ge=1)
    held_out: int = Field(ge=0)
    simulated: bool
    partitions: int = Field(ge=0)
    versions: str = Field(max_length=_LONGEST)
    candidates: int = Field(default=0, ge=0)


class Roster:
    """Knows the sites by name; asks nodes that it has not seen yet who they are."""

    def __init__(self, base_digest: str, timeout: float, run: str = "") -> None:
        self._base_digest = base_digest
        self._run = run
        self._timeout = timeout
        self._versions = versions()
        self._known: dict[int, Member | Refused] = {}  # a member, or why the node is none
        self._late: dict[str, int] = {}  # questions without an answer yet, and whom they went to
        self._refused_of = 0  # partitions of the simulation that a refused node is part of
        self._warned: set[tuple[int, str]] = set()

    def refresh(self, grid: Grid, done: int = 0) -> dict[str, Member]:
        """Members that are connected now, by name; new nodes are asked first.

        A node that does not answer in time holds nothing up later on: its answer counts once it
        comes. Of two nodes with one name the one that has been here longer stays. New nodes hear
        that `done` rounds are finished, since they judge by what the others would cost them.
        """
        connected = set(grid.get_node_ids())
        # A site that comes back may have been mended, so that it is asked again.
        self._known = {node: known for node, known in self._known.items() if node in connected}
        self._late = {question: node for question, node in self._late.items() if node in connected}
        for reply in sorted(self._answers(grid, connected, done), key=_source):
            self._known.setdefault(_source(reply), self._judge(reply))
        members: dict[str, Member] = {}
        for node, known in self._known.items():
            if isinstance(known, Refused):
                who = known.site or "A node"
                self._warn(node, f"{who} takes no part: {known.reason}")
            elif known.site in members:
                self._warn(
                    node, f"Two nodes call themselves {known.site!r}; the second takes no part."
                )
            else:
                members[known.site] = known
                self._compare_versions(known)
        return dict(sorted(members.items()))

    def _answers(self, grid: Grid, connected: set[int], done: int) -> list[Message]:
        about = ConfigRecord({"base": self._base_digest, "run": self._run, "done": done})
        question = RecordDict({"question": about})
        new = sorted(connected - set(self._known) - set(self._late.values()))
        messages = [
            Message(question, node, MessageType.QUERY, group_id="roll-call") for node in new
        ]
        replies = list(gather(grid, self._late, timeout=0)) if self._late else []
        if messages:
            sent = set(grid.push_messages(messages))  # one that could not be sent is asked again
            ids = {
                message.metadata.message_id: message.metadata.dst_node_id for message in messages
            }
            asked = {question: node for question, node in ids.items() if question in sent}
            replies += gather(grid, asked, self._timeout)
            self._late |= asked
        for reply in replies:
            self._late.pop(reply.metadata.reply_to_message_id, None)
        return [reply for reply in replies if _source(reply) in connected]

    def _warn(self, node: int, text: str) -> None:
        if (node, text) not in self._warned:
            self._warned.add((node, text))
            log(WARNING, "%s", text)

    def _compare_versions(self, member: Member) -> None:
        if member.versions != self._versions:
            self._warn(
                member.node_id,
                f"{member.site} runs {member.versions}, the server {self._versions}: the same seed "
                "may give other bits there.",
            )

    def refused(self) -> dict[str, str]:
        """Why connected nodes take no part, by the name they gave, or by a number without one."""
        reasons = [known for known in self._known.values() if isinstance(known, Refused)]
        return {r.site or f"unnamed {number}": r.reason for number, r in enumerate(reasons, 1)}

    def present(self, grid: Grid, done: int = 0) -> Mapping[str, int]:
        """Node ids of the connected sites, by name, after `done` rounds."""
        return {site: member.node_id for site, member in self.refresh(grid, done).items()}

    def assemble(
        self, grid: Grid, min_sites: int, timeout: float, done: int = 0
    ) -> dict[str, Member]:
        """Wait until enough sites are there, all of them in a simulation; `done` rounds are done.

        Raises ConfigError with the sites' own reasons when they are not there in `timeout` seconds
        or cannot take part.
        """
        deadline = time.monotonic() + timeout
        shown = -1
        while True:
            members = self.refresh(grid, done)
            refused = [r.reason for r in self._known.values() if isinstance(r, Refused)]
            simulated = all(member.simulated for member in members.values())
            partitions = [member.partitions for member in members.values() if simulated]
            expected = max(partitions, default=0 if members else self._refused_of)
            enough = len(members) >= min_sites
            all_here = len(members) + len(refused) >= (expected or min_sites)
            late = time.monotonic() > deadline
            if enough and (all_here or late):
                return members
            if late or (expected and all_here):
                raise ConfigError(
                    f"Expected at least {min_sites} sites (strategy.min-sites), got "
                    f"{len(members)}" + (f": {'; '.join(refused)}" if refused else "") + ". Start "
                    "more sites, mend those, or lower strategy.min-sites."
                )
            if len(members) != shown:
                shown = len(members)
                log(INFO, "Waiting for sites: %d of %d are here.", shown, expected or min_sites)
            time.sleep(min(0.3, max(deadline - time.monotonic(), 0.01)))

    def _judge(self, reply: Message) -> Member | Refused:
        if reply.has_error():
            reason = f"it answered the roll call with an error: {reply.error.reason}"
            return Refused(reason[:_LONGEST])
        record = config_of(reply.content, "member")
        values = {key.replace("-", "_"): record[key] for key in record}
        if told := values.get("error"):
            partitions = values.get("partitions")
            if values.get("simulated") is True and isinstance(partitions, int):
                self._refused_of = max(self._refused_of, partitions)
            return Refused(str(told)[:_LONGEST], str(values.get("site", ""))[:_NAME])
        base = values.pop("base", None)
        try:
            answer = _Answer.model_validate(values)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            return Refused(
                f"Expected an answer to the roll call with {', '.join(_Answer.model_fields)}, but "
                f"{wrong}; give that site the same version of the app."
            )
        if base != self._base_digest:
            return Refused(
                f"Expected site {answer.site!r} to hold the server's base model "
                f"{self._base_digest[:12]}, got {str(base)[:12]}; give it the same "
                "files as model-path.",
                answer.site,
            )
        return Member(
            answer.site, _source(reply), answer.rows, answer.held_out, answer.simulated,
            answer.partitions, answer.versions, answer.candidates,
        )  # fmt: skip


def _source(message: Message) -> int:
    return int(message.metadata.src_node_id)
