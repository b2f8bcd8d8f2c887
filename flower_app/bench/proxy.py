"""A TCP proxy that delays what passes it, for links with a long way between the two sides.

Where network namespaces are not permitted, `tc netem` cannot be had. Every chunk is sent on a fixed
time after it came, in each direction, so that bandwidth is not limited.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread

_CHUNK = 1 << 18
_Due = tuple[float, bytes]


class DelayingProxy:
    """Forwards connections to a local port; use as a context manager.

    `round_trip_s` is added to the way there and back; `seen`, if given, gets every chunk. `passed`
    counts the bytes of both directions.
    """

    def __init__(
        self, port: int, round_trip_s: float = 0.0, seen: Callable[[bytes], object] | None = None
    ) -> None:
        self._target = port
        self._delay = round_trip_s / 2
        self._seen = seen
        self._lock = Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.passed = 0
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
                outer = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with self._lock:
                self._sockets += [inner, outer]
            for source, sink in ((inner, outer), (outer, inner)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                queue: SimpleQueue[_Due | None] = SimpleQueue()
                Thread(target=self._read, args=(source, queue), daemon=True).start()
                Thread(target=self._write, args=(queue, sink), daemon=True).start()

    def _read(self, source: socket.socket, queue: SimpleQueue[_Due | None]) -> None:
        try:
            while chunk := source.recv(_CHUNK):
                queue.put((time.monotonic() + self._delay, chunk))
                with self._lock:
                    self.passed += len(chunk)
                if self._seen:
                    self._seen(chunk)
        except OSError:
            pass
        queue.put(None)

    def _write(self, queue: SimpleQueue[_Due | None], sink: socket.socket) -> None:
        try:
            while (due := queue.get()) is not None:
                wait = due[0] - time.monotonic()
                if wait > 0:
                    time.sleep(wait)
                sink.sendall(due[1])
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def __enter__(self) -> DelayingProxy:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all connections."""
        self._listener.close()
        with self._lock:
            for one in self._sockets:
                one.close()
