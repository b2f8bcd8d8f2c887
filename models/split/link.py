"""The site's end of a stream of frames: its link to the middle, whatever the transport.

A stream that breaks fails what is under way, with the reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread

import torch
from torch import Tensor

from models.seeds import derive
from models.split.messages import Kind, Message
from models.split.step import SplitError

Frames = Iterator[bytes]


@dataclass(frozen=True)
class Limits:
    """What one message may hold, and how values travel (one of `wire.KINDS`)."""

    most_tokens: int
    hidden_size: int
    precision: str = "bf16"

    def decode(self, frame: bytes) -> Message:
        """The message in a frame; raises WireError."""
        return Message.decode(frame, most_tokens=self.most_tokens, hidden_size=self.hidden_size)


class FrameLink:
    """The site's end: a `Link` over frames; use as a context manager.

    `exchange` sends the frames it is given, as they come, and yields those that come back. Every
    question is answered in its turn; when the stream ends, all that wait get the reason. Gradients
    are rounded by draws from `seed`, where they travel as whole numbers.
    """

    def __init__(
        self, exchange: Callable[[Frames], Frames], limits: Limits, *, seed: int = 0
    ) -> None:
        self._limits = limits
        self._generator = torch.Generator().manual_seed(derive(seed, "rounding"))
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._waiting: deque[tuple[Kind, int, Future[Tensor]]] = deque()
        self._lock = Lock()
        self._ended: BaseException | None = None
        self.bytes_up = self.bytes_down = 0
        self._reader = Thread(target=self._read, args=(exchange,), name="split", daemon=True)
        self._reader.start()

    def forward(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        """Hidden states behind the middle, of those before it."""
        return self._ask(Message(Kind.FORWARD, key, hidden, mask.cpu()), Kind.HIDDEN)

    def score(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        """Hidden states behind the middle as it was when the round began."""
        return self._ask(Message(Kind.SCORE, key, hidden, mask.cpu()), Kind.SCORED)

    def backward(self, key: int, gradient: Tensor) -> Future[Tensor]:
        """The gradient before the middle, of that behind it."""
        return self._ask(Message(Kind.BACKWARD, key, gradient), Kind.GRADIENT)

    def step(self, number: int) -> Future[Tensor]:
        """Done when the middle has taken its optimiser step."""
        return self._ask(Message(Kind.STEP, number), Kind.STEPPED)

    def open(self, model: int) -> Future[Tensor]:
        """Done when the server is ready for a text, having the middle of this model."""
        return self._ask(Message(Kind.OPEN, model), Kind.OPENED)

    def generate(self, position: int, hidden: Tensor) -> Future[Tensor]:
        """Hidden states behind the middle of the tokens from `position` on."""
        return self._ask(Message(Kind.GENERATE, position, hidden), Kind.GENERATED)

    def _ask(self, question: Message, answer: Kind) -> Future[Tensor]:
        frame = question.encode(self._limits.precision, self._generator)
        future: Future[Tensor] = Future()
        with self._lock:
            if self._ended is not None:
                future.set_exception(self._ended)
                return future
            self._waiting.append((answer, question.key, future))
            self.bytes_up += len(frame)
            self._outgoing.put(frame)
        return future

    def _read(self, exchange: Callable[[Frames], Frames]) -> None:
        try:
            for frame in exchange(iter(self._outgoing.get, None)):
                self.bytes_down += len(frame)
                self._answer(self._limits.decode(frame))
            self._end(SplitError("Expected the server to answer, but it ended the stream."))
        except Exception as error:
            self._end(error)

    def _answer(self, found: Message) -> None:
        with self._lock:
            kind, key, future = self._waiting.popleft() if self._waiting else (None, 0, None)
        if future is None or (found.kind, found.key) != (kind, key):
            if future is not None:
                self._waiting.appendleft((found.kind, key, future))
            raise SplitError(
                f"Expected the answer to {key}, got {found.kind.name} for {found.key}; use the "
                "same version at both ends."
            )
        future.set_result(torch.empty(0) if found.values is None else found.values)

    def _end(self, reason: BaseException) -> None:
        with self._lock:
            self._ended = reason
            waiting = list(self._waiting)
            self._waiting.clear()
        self._outgoing.put(None)
        for _, _, future in waiting:
            future.set_exception(reason)

    def close(self) -> None:
        """End the stream, without waiting for answers that are still to come."""
        self._outgoing.put(None)
        self._reader.join(timeout=0 if self._waiting else 10)

    def __enter__(self) -> FrameLink:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
