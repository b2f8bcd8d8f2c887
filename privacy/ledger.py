"""The ledger: every release, on disk before it leaves, in a file that only ever grows."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.disk import make_folder, sync
from privacy.accounting import spent
from privacy.events import Event, Unit, of_unit

FILE = "ledger.jsonl"
_BUSY_S = 30.0  # the longest that a process waits for another one to be done with the ledger
_START = hashlib.sha256(b"florilegium ledger 1").hexdigest()

# Told of what was spent before and of what is to be spent now; raises to refuse it.
Check = Callable[[list[Event], Sequence[Event]], None]


class LedgerError(OSError):
    """A ledger that could not be read, written or trusted; nothing may be released without it."""


class Ledger:
    """An append-only JSONL file of events, each line bound to all lines before it by SHA-256.

    A line is on disk when `append` returns, so that a crash counts too much, never too little. The
    last of a batch may be torn by a crash: it belongs to a release that never left, and is written
    over. `<name>.head` says how many lines there are at least: a file that is shorter than that, or
    that was edited, is refused. Who deletes both files begins anew: this guards against accidents,
    not against the site's own operator.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head = path.with_name(f"{path.name}.head")
        self._lock = path.with_name(f"{path.name}.lock")

    def events(self) -> list[Event]:
        """All events, oldest first; raises LedgerError for a file that was changed."""
        try:
            return self._read()[0]
        except OSError as error:
            raise self._failed("read", error) from error

    def append(self, events: Sequence[Event], check: Check | None = None) -> None:
        """Add events and wait until the disk has them; raises LedgerError, or what `check` raises.

        `check` sees the events before these while no other process can add any. On failure the
        events count as not released: release nothing.
        """
        if not events:
            return
        try:
            make_folder(self.path.parent)
            with self._locked():
                past, chain, end = self._read()
                if check:
                    check(past, events)
                self._write(events, len(past), chain, end)
        except LedgerError:
            raise
        except OSError as error:
            raise self._failed("written to", error) from error

    def spent(self, unit: Unit, delta: float) -> float:
        """Epsilon of all events so far, as they touch one unit."""
        return spent(of_unit(self.events(), unit), delta)

    def remaining(self, unit: Unit, delta: float, budget: float) -> float:
        """What is left of a budget, never below 0: the next release may still cost more than that.

        Composition is not addition: what can be afforded is told by composing it with the rest.
        """
        return max(0.0, budget - self.spent(unit, delta))

    def _read(self) -> tuple[list[Event], str, int]:
        """Events, the hash that the next line continues, and where that line begins."""
        count, last = self._known()
        text = self.path.read_bytes() if self.path.exists() else b""
        events: list[Event] = []
        chain, end = _START, 0
        while (stop := text.find(b"\n", end)) >= 0:
            event, chain = self._line(text[end:stop], len(events), chain)
            events.append(event)
            end = stop + 1
            if len(events) == count and chain != last:
                raise self._changed(f"line {count} is not the one that was written")
        if len(events) < count:
            raise self._changed(f"{count} lines were written and {len(events)} are there")
        return events, chain, end

    def _line(self, line: bytes, number: int, chain: str) -> tuple[Event, str]:
        try:
            entry = json.loads(line)
            told = entry.pop("chain")
            following = _following(chain, entry)
            if told != following or entry.pop("line") != number + 1:
                raise self._changed(f"line {number + 1} does not continue the lines before it")
            return Event.of_dict(entry), following
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._changed(f"line {number + 1} cannot be read ({error})") from error

    def _known(self) -> tuple[int, str]:
        """How many lines there are at least, and the hash of the last of them."""
        try:
            head = json.loads(self._head.read_bytes())
            return int(head["lines"]), str(head["chain"])
        except FileNotFoundError:
            if self.path.exists() and b"\n" in self.path.read_bytes():
                raise self._changed(f"{self._head.name} is gone") from None
            return 0, _START
        except (ValueError, KeyError, TypeError) as error:
            raise self._changed(f"{self._head.name} cannot be read ({error})") from error

    def _write(self, events: Sequence[Event], count: int, chain: str, end: int) -> None:
        lines = []
        for number, event in enumerate(events, count + 1):
            entry = {"line": number, **event.as_dict()}
            chain = _following(chain, entry)
            lines.append(json.dumps({**entry, "chain": chain}))
        if count == 0:  # without a head there would be no telling a lost one from a first line
            self._write_head(0, _START)
        text = "".join(f"{line}\n" for line in lines).encode()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, end)  # a line that a crash tore
            try:
                _write_at(descriptor, text, end)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        sync(self.path.parent)
        self._write_head(count + len(events), chain)

    def _write_head(self, count: int, chain: str) -> None:
        temporary = self._head.with_name(f".{self._head.name}.part")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"lines": count, "chain": chain}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._head)
        sync(self.path.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the ledger; the system lets go of it when this process ends, however it ends."""
        deadline = time.monotonic() + _BUSY_S
        with self._lock.open("ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise LedgerError(
                            f"Expected to get hold of the ledger {str(self.path)!r} within "
                            f"{_BUSY_S:g} s, but another process keeps it; look for one that hangs."
                        ) from None
                time.sleep(0.02)
            yield

    def _changed(self, what: str) -> LedgerError:
        return LedgerError(
            f"Expected the ledger {str(self.path)!r} as it was written, but {what}; bring "
            "the file and its .head back from a copy. Nothing is released until then."
        )

    def _failed(self, what: str, error: OSError) -> LedgerError:
        if isinstance(error, LedgerError):
            return error
        return LedgerError(
            f"Expected the ledger {str(self.path)!r} to be {what}, but: {error}. Nothing was "
            "released: free some space, or mend the folder."
        )


def _following(chain: str, entry: dict[str, Any]) -> str:
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{chain}\n{text}".encode()).hexdigest()


def _write_at(descriptor: int, text: bytes, offset: int) -> None:
    while text:  # a disk that fills up takes a part
        written = os.pwrite(descriptor, text, offset)
        text, offset = text[written:], offset + written
