"""Where a site keeps a session between two messages: in a file that is taken once.

In deployment each message has a process of its own, and two of them may run at the same time. So a
session is taken by renaming its file, which one process wins. That it is taken, kept or destroyed
is on disk before the answer leaves: a server that asks twice gets one answer, also where the power
fails between.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from models.disk import make_folder, sync
from privacy.secure.errors import SecureError
from privacy.secure.site import Session


class Sessions:
    """The one session of a site in a run, in a folder that only its owner can read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "session.json"

    def begin(self, session: Session) -> None:
        """Keep a new session in place of whatever is there; raises OSError, SecureError."""
        self.clear()
        self.keep(session)

    def take(self) -> Session:
        """Take the session away, so that nobody else has it; raises SecureError without one."""
        mine = self.folder / f"{uuid.uuid4().hex}.taken"
        try:
            self._file.rename(mine)
        except FileNotFoundError:
            raise SecureError(
                "Expected a session of secure aggregation at this site, got none: the server asks "
                "twice, or the site has not got past the step before."
            ) from None
        try:
            return Session.loads(mine.read_text(encoding="utf-8"))
        finally:
            mine.unlink(missing_ok=True)
            sync(self.folder)

    def keep(self, session: Session) -> None:
        """Keep a session after a step; raises SecureError where another has begun meanwhile."""
        make_folder(self.folder, 0o700)
        fresh = self.folder / f"{uuid.uuid4().hex}.new"
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(session.dumps())
                file.flush()
                os.fsync(file.fileno())
            os.link(fresh, self._file)  # unlike a rename, this does not replace
        except FileExistsError:
            raise SecureError(
                "Expected one session of secure aggregation at a time, got a second one; the "
                "server has begun another meanwhile."
            ) from None
        finally:
            fresh.unlink(missing_ok=True)
        sync(self.folder)

    def clear(self) -> None:
        """Destroy what is there."""
        for left in self.folder.glob("*.*"):
            left.unlink(missing_ok=True)
        if self.folder.is_dir():
            sync(self.folder)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
