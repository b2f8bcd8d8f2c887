"""A training step across the cut, at the site and in whatever transport.

Hidden states go from head to middle to tail, gradients back the same way (FL-GLM, Zheng et al.
2024, section 3.2). Several micro-batches may be under way at once, so that neither side waits for
the way there and back; what is computed, and in which order, does not depend on when answers come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.batches import Batch
from models.split.cut import Head, Tail
from models.text import IGNORED
from models.train import Step, autocast, on


class SplitError(RuntimeError):
    """A step across the cut that cannot go on."""


class Link(Protocol):
    """The way to the middle and back; answers come in the order of the questions."""

    def forward(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        """Hidden states behind the middle, of those before it; `mask` is (batch, tokens)."""

    def backward(self, key: int, gradient: Tensor) -> Future[Tensor]:
        """The gradient before the middle, of that behind it, for the forward pass `key`."""


class Stream(Link, Protocol):
    """A link that leads to the middle for a whole round."""

    def score(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        """Hidden states behind the middle as it was when the round began."""

    def step(self, number: int) -> Future[Tensor]:
        """Done when the middle has taken its optimiser step."""


def in_front(tensor: Tensor, hidden: Tensor, value: int) -> Tensor:
    """A tensor (batch, tokens) as long as hidden states with virtual tokens before the text."""
    return nn.functional.pad(tensor, (hidden.shape[1] - tensor.shape[1], 0), value=value)


def answered(tail: Tail, behind: Tensor, mask: Tensor, labels: Tensor | None) -> Any:
    """The library's output for hidden states behind the middle; nothing is asked of a prompt."""
    if labels is not None and labels.dim() == 2:
        labels = in_front(labels, behind, IGNORED)
    return tail.output(behind, in_front(mask, behind, 1), labels=labels)


class SiteStep:
    """The site's side of an optimiser step: leaves gradients in head and tail.

    `in_flight` is the number of micro-batches under way at a time. Calling it is the `gradient` of
    `models.train.optimise`, where the loss of a step is the mean over all its counted labels.
    """

    def __init__(
        self,
        head: Head,
        tail: Tail,
        link: Link,
        batches: Iterator[Batch],
        *,
        accumulation: int = 1,
        in_flight: int = 1,
        precision: str = "float32",
    ) -> None:
        self._head = head
        self._tail = tail
        self._link = link
        self._batches = batches
        self._accumulation = accumulation
        self._in_flight = in_flight
        self._precision = precision
        self._keys = 0
        first = next(tail.parameters())
        self._device, self._dtype = first.device, first.dtype

    def __call__(self) -> Step:
        """One step's worth of micro-batches."""
        micro = [next(self._batches) for _ in range(self._accumulation)]
        return self._run(micro)

    def _run(self, micro: Sequence[Batch]) -> Step:
        counted = sum(batch.counted for batch in micro)
        total = torch.zeros((), device=self._device)
        # What is waited for, in the order in which it was asked for, and what is done with it.
        waiting: deque[tuple[Future[Tensor], Callable[[Tensor], None]]] = deque()
        under_way = 0

        def ended(hidden: Tensor, gradient: Tensor) -> None:
            nonlocal under_way
            under_way -= 1
            if hidden.requires_grad:  # a head that is frozen has nothing to learn
                torch.autograd.backward(hidden, gradient.to(hidden))

        def returned(batch: Batch, key: int, hidden: Tensor, behind: Tensor) -> None:
            nonlocal total
            loss, gradient = self._tail_pass(batch, behind, batch.counted / counted)
            total = total + loss
            answer = self._link.backward(key, gradient)
            waiting.append((answer, lambda found: ended(hidden, found)))

        def advance() -> None:
            answer, go_on = waiting.popleft()
            go_on(answer.result())

        for batch in micro:
            while under_way >= self._in_flight:
                advance()
            self._keys, under_way = self._keys + 1, under_way + 1
            self._launch(batch, self._keys, waiting, returned)
        while waiting:
            advance()
        return Step(total, sum(b.tokens for b in micro), sum(b.useful for b in micro))

    def _launch(
        self,
        batch: Batch,
        key: int,
        waiting: deque[tuple[Future[Tensor], Callable[[Tensor], None]]],
        returned: Callable[[Batch, int, Tensor, Tensor], None],
    ) -> None:
        """The head's forward pass, whose result goes on its way."""
        given = on(batch.inputs, self._device)
        mask = given.pop("attention_mask")
        given.pop("labels")
        with autocast(self._precision, self._device):
            hidden = self._head(given.pop("input_ids"), mask, **given)
        answer = self._link.forward(key, hidden.detach(), in_front(mask, hidden, 1))
        waiting.append((answer, lambda behind: returned(batch, key, hidden, behind)))

    def _tail_pass(self, batch: Batch, behind: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Loss times its share of the step, and the gradient behind the middle."""
        given = on(batch.inputs, self._device)
        behind = behind.detach().to(self._device, self._dtype).requires_grad_()
        with autocast(self._precision, self._device):
            output = answered(self._tail, behind, given["attention_mask"], given["labels"])
        loss = output.loss * share
        loss.backward()
        assert behind.grad is not None
        return loss.detach(), behind.grad
