"""Training across the cut is training of the whole, however many micro-batches are under way."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from models.batches import Batch
from models.config import TrainConfig
from models.payload import Payload
from models.split import Parts, cut
from models.split.middle import MiddleWorker
from models.split.step import SiteStep, SplitError
from models.train import optimise, train
from tests.models.split.families import batch as drawn
from tests.models.split.families import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = TrainConfig(optimizer="sgd", max_grad_norm=0.0, grad_accumulation=3, precision="float32")


# Dropout is drawn in another order on two sides than on one.
NO_DROPOUT = dict.fromkeys(
    ("embd_pdrop", "resid_pdrop", "attn_pdrop", "hidden_dropout_prob",
     "attention_probs_dropout_prob"), 0.0,
)  # fmt: skip


class Near:
    """A link without any way between the two sides."""

    def __init__(self, worker: MiddleWorker) -> None:
        self.worker = worker
        self.most = 0

    def forward(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        found = done(self.worker.forward("site", key, hidden, mask))
        self.most = max(self.most, len(self.worker))
        return found

    def backward(self, key: int, gradient: Tensor) -> Future[Tensor]:
        return done(self.worker.backward("site", key, gradient))


class Far(Near):
    """One with a way: answers come later, from another thread, in the order of the questions."""

    def __init__(self, worker: MiddleWorker) -> None:
        super().__init__(worker)
        self.thread = ThreadPoolExecutor(1)
        self.seen: set[int] = set()

    def forward(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        return self.thread.submit(self._later, lambda: super(Far, self).forward(key, hidden, mask))

    def backward(self, key: int, gradient: Tensor) -> Future[Tensor]:
        return self.thread.submit(self._later, lambda: super(Far, self).backward(key, gradient))

    def _later(self, ask: object) -> Tensor:
        self.seen.add(threading.get_ident())
        time.sleep(0.001)
        found: Tensor = ask().result()  # type: ignore[operator]
        return found


def done(value: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(value)
    return future


def batches(family: str) -> Iterator[Batch]:
    seed = 0
    while True:
        inputs = drawn(family, seed)
        # Some labels fewer in every other batch, so that losses do not weigh the same.
        if family != "bert" and seed % 2:
            inputs["labels"][:, :4] = -100
        counted = int((inputs["labels"] != -100).sum())
        yield Batch(inputs, counted, inputs["input_ids"].numel(), counted, ())
        seed += 1


def site_of(parts: Parts) -> Payload:
    return Payload("full", nn.ModuleDict({"head": parts.head, "tail": parts.tail}))


@pytest.mark.parametrize(
    ("family", "link", "in_flight"),
    [
        *(("llama", link, in_flight) for link in (Near, Far) for in_flight in (1, 2, 5)),
        ("gpt2", Near, 2), ("gpt2", Far, 5), ("bert", Near, 5), ("bert", Far, 2),
    ],
)  # fmt: skip
def test_twenty_steps_are_those_of_the_whole(family: str, link: type[Near], in_flight: int) -> None:
    whole = tiny(family, tie_word_embeddings=False, **NO_DROPOUT)
    parts = cut(copy.deepcopy(whole))
    central = train(
        Payload("full", whole), batches(family), PLAIN, steps=20, learning_rate=0.05, seed=1
    )
    near = link(MiddleWorker(parts.middle, most=in_flight))
    step = SiteStep(
        parts.head, parts.tail, near, batches(family), accumulation=3, in_flight=in_flight
    )
    middle = torch.optim.SGD(parts.middle.parameters(), lr=0.05)

    def gradient() -> object:
        found = step()
        middle.step()
        middle.zero_grad()
        return found

    split = optimise(
        site_of(parts),
        gradient,
        PLAIN,
        steps=20,
        learning_rate=0.05,
        seed=1,  # type: ignore[arg-type]
    )
    assert split.loss == pytest.approx(central.loss, abs=1e-5)
    assert near.most == min(in_flight, 3)
    trained = dict(whole.named_parameters())
    for part in parts:
        for name, parameter in part.named_parameters():
            expected = trained[part.name_in_whole(name)]
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5)


def test_a_frozen_head_learns_nothing_and_the_rest_does() -> None:
    parts = cut(tiny("llama", tie_word_embeddings=False))
    parts.head.requires_grad_(False)
    step = SiteStep(
        parts.head, parts.tail, Near(MiddleWorker(parts.middle, most=1)), batches("llama")
    )
    step()
    assert all(p.grad is None for p in parts.head.parameters())
    assert all(p.grad is not None for part in parts[1:] for p in part.parameters())


def test_the_middle_keeps_to_its_limits() -> None:
    worker = MiddleWorker(cut(tiny("llama")).middle, most=2)
    hidden, mask = torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.int64)
    worker.forward("ann", 1, hidden, mask)
    with pytest.raises(SplitError, match="got 1 of 'ann' twice"):
        worker.forward("ann", 1, hidden, mask)
    worker.forward("bob", 1, hidden, mask)
    worker.forward("ann", 2, hidden, mask)
    with pytest.raises(SplitError, match=r"at most 2 .*got one more by 'ann'; lower split.in-"):
        worker.forward("ann", 3, hidden, mask)
    with pytest.raises(SplitError, match="under way, got 7 of 'ann'"):
        worker.backward("ann", 7, hidden)
    worker.forget("bob")
    assert len(worker) == 2
    with pytest.raises(SplitError, match=r"shape \(1, 3, 32\) from 'ann', got \(1, 3, 31\)"):
        worker.backward("ann", 1, torch.zeros(1, 3, 31))
    worker.forget("ann")
    assert len(worker) == 0
