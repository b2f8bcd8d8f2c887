"""A stream's frames, read by a thread of its own, one or two ahead."""

from __future__ import annotations

from threading import Condition, Thread

from models.split.link import Frames


class Inbox:
    """The frames of one stream, read by a thread of its own, to wait for with a limit."""

    def __init__(self, frames: Frames) -> None:
        self._changed = Condition()
        self._frame: bytes | None = None
        self._over = False
        self._reason: BaseException | None = None
        Thread(target=self._read, args=(frames,), name="split-inbox", daemon=True).start()

    def _read(self, frames: Frames) -> None:
        reason: BaseException | None = None
        try:
            for frame in frames:
                with self._changed:
                    self._changed.wait_for(lambda: self._frame is None or self._over)
                    if self._over:
                        return
                    self._frame = frame
                    self._changed.notify_all()
        except Exception as error:  # whatever the transport says of a stream that broke
            reason = error
        self.close(reason)

    def next(self, timeout: float) -> bytes | None:
        """The next frame, None after the last; raises why the stream broke, and TimeoutError."""
        with self._changed:
            there = self._changed.wait_for(lambda: self._frame is not None or self._over, timeout)
            if self._reason is not None:
                raise self._reason
            if not there:
                raise TimeoutError
            frame, self._frame = self._frame, None
            self._changed.notify_all()
            return frame

    def close(self, reason: BaseException | None = None) -> None:
        """Let nothing more come; a reason is raised in whoever waits."""
        with self._changed:
            if not self._over:
                self._over, self._reason = True, reason
            self._changed.notify_all()
