"""The roll call: which site sits behind which node id, and may it take part."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from models.section import ConfigError
from strategies.flower import collect


@dataclass(frozen=True)
class Member:
    """A site as it presented itself; `rows` and `held_out` count examples."""

    site: str
    node_id: int
    rows: int
    held_out: int
    simulated: bool
    partitions: int
    versions: str


class Roster:
    """Knows the sites by name; asks nodes that it has not seen yet who they are."""

    def __init__(self, base_digest: str, timeout: float) -> None:
        self._base_digest = base_digest
        self._timeout = timeout
        self._known: dict[int, Member | str] = {}  # a member, or why the node is none

    def refresh(self, grid: Grid) -> dict[str, Member]:
        """Members that are connected now, by name; new nodes are asked first."""
        connected = set(grid.get_node_ids())
        new = sorted(connected - set(self._known))
        question = RecordDict({"question": ConfigRecord({"base": self._base_digest})})
        messages = [Message(question, node, MessageType.QUERY, group_id="roll-call") for node in new]
        for reply in collect(grid, messages, self._timeout) if messages else ():
            node = reply.metadata.src_node_id
            self._known[node] = self._judge(reply)
            if isinstance(self._known[node], str):
                log(WARNING, "A node takes no part: %s", self._known[node])
        members: dict[str, Member] = {}
        for node in sorted(connected & set(self._known)):
            member = self._known[node]
            if isinstance(member, str):
                continue
            if member.site in members:
                log(WARNING, "Two nodes call themselves %r; the second takes no part.", member.site)
                continue
            members[member.site] = member
        return dict(sorted(members.items()))

    def present(self, grid: Grid) -> Mapping[str, int]:
        """Node ids of the connected sites, by name."""
        return {site: member.node_id for site, member in self.refresh(grid).items()}

    def assemble(self, grid: Grid, min_sites: int, timeout: float) -> dict[str, Member]:
        """Wait until enough sites are there, all of them in a simulation.

        Raises ConfigError with the sites' own reasons when they are not there in `timeout` seconds
        or cannot take part.
        """
        deadline = time.monotonic() + timeout
        shown = -1
        while True:
            members = self.refresh(grid)
            refused = [reason for reason in self._known.values() if isinstance(reason, str)]
            expected = max((m.partitions for m in members.values()), default=0) or min_sites
            if len(members) + len(refused) >= expected and len(members) >= min_sites:
                return members
            simulated = any(m.simulated for m in members.values())
            if time.monotonic() > deadline or (simulated and len(members) + len(refused) >= expected):
                raise ConfigError(
                    f"Expected at least {min_sites} sites (strategy.min-sites), got "
                    f"{len(members)}" + (f": {'; '.join(refused)}" if refused else "") + ". Start "
                    "more sites, mend those, or lower strategy.min-sites."
                )
            if len(members) != shown:
                shown = len(members)
                log(INFO, "Waiting for sites: %d of %d are here.", shown, expected)
            time.sleep(0.3)

    def _judge(self, reply: Message) -> Member | str:
        if reply.has_error():
            return f"it answered the roll call with an error: {reply.error.reason}"
        record = reply.content.config_records.get("member", ConfigRecord())
        values = {key: record[key] for key in record}
        if error := values.get("error"):
            return str(error)
        try:
            member = Member(
                site=str(values["site"]),
                node_id=reply.metadata.src_node_id,
                rows=int(str(values["rows"])),
                held_out=int(str(values["held-out"])),
                simulated=bool(values["simulated"]),
                partitions=int(str(values["partitions"])),
                versions=str(values["versions"]),
            )
        except (KeyError, ValueError) as error:
            return f"its answer to the roll call is malformed: {error!r}"
        if values.get("base") != self._base_digest:
            return (
                f"Expected site {member.site!r} to hold the server's base model "
                f"{self._base_digest[:12]}, got {str(values.get('base'))[:12]}; give it the same "
                "files as model-path."
            )
        return member
