"""One site's fault is its own: values that blow up, passes that fail, sites that leave early."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import TrainConfig
from models.split import Parts, cut
from models.split.link import Limits
from models.split.middle import Backward, Forward, MiddleWorker
from models.split.rounds import Trainer
from models.split.schedule import client_batch, hierarchical, sequential
from models.split.step import SplitError
from tests.models.split.families import tiny
from tests.models.split.sites import in_threads, linked, middles, settings

pytestmark = pytest.mark.usefixtures("one_thread")

ADAM = TrainConfig(optimizer="adamw", max_grad_norm=1.0, grad_accumulation=1, precision="float32")
HUGE = 3e38  # finite, and what a middle makes of it need not be


def model(family: str = "llama") -> Parts:
    return cut(tiny(family, tie_word_embeddings=False) if family == "llama" else tiny(family))


def question(value: float = 1.0, tokens: int = 3) -> tuple[Tensor, Tensor]:
    return torch.full((1, tokens, 32), value), torch.ones(1, tokens, dtype=torch.int64)


@pytest.mark.parametrize("schedule", [client_batch, sequential])
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize(("hidden", "gradient"), [(1.0, HUGE), (HUGE, 1.0), (HUGE, HUGE)])
def test_huge_values_fail_their_own_site_alone(
    schedule: Any, wire: str, hidden: float, gradient: float
) -> None:
    limits = Limits(99, 32, wire)
    round_ = schedule([model().middle], ["ann", "bob"], settings(limits=limits, train=ADAM))

    def spoils() -> None:
        with linked(round_, "ann", limits) as ann:
            ann.forward(1, *question(hidden)).result(timeout=20)
            ann.backward(1, question(gradient)[0]).result(timeout=20)

    def learns() -> None:
        with linked(round_, "bob", limits) as bob:
            for number in (1, 2):
                behind = bob.forward(number, *question()).result(timeout=20)
                before = bob.backward(number, question()[0]).result(timeout=20)
                assert bool(behind.isfinite().all() and before.isfinite().all())
                bob.step(number).result(timeout=20)

    ann, bob = in_threads([spoils, learns])
    with pytest.raises(SplitError, match=r"Expected .* of 'ann' .* NaN or Inf"):
        ann.result(timeout=20)
    bob.result(timeout=20)
    ((learnt, sites),) = round_.finish()
    assert sites == 1
    assert learnt and all(bool(tensor.isfinite().all()) for tensor in learnt.values())
    assert set(round_.dropped) == {"ann"} and round_.steps == 2


def drawn(seed: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 32, generator=generator), torch.ones(2, tokens).long()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("late", [False, True])
def test_what_the_others_get_does_not_depend_on_the_one_that_fails(family: str, late: bool) -> None:
    """Nothing of a bad gradient is added up, and the others' are those of a graph without it."""
    spoilt, clean = (MiddleWorker(part, most=2) for part in middles(model(family), 2))
    for worker in (spoilt, clean):
        worker._middle.train()
    forwards = [Forward(n, 1, *drawn(at, 4 + at)) for at, n in enumerate(("ann", "bob", "cid"))]
    backs = [Backward(f.site, 1, drawn(9, f.mask.shape[1])[0]) for f in forwards]
    for worker in (spoilt, clean):
        worker.forward_all(forwards)
    bad = backs[1]._replace(gradient=torch.full_like(backs[1].gradient, HUGE))
    clean.forget("bob")
    first, rest = ([bad, backs[2]], [backs[0]]) if late else ([backs[0], bad, backs[2]], [])
    found = {one.site: got for one, got in zip(first, spoilt.backward_all(first), strict=True)}
    found |= {one.site: got for one, got in zip(rest, spoilt.backward_all(rest), strict=True)}
    expected = clean.backward_all([backs[0], backs[2]])
    assert isinstance(found["bob"], SplitError)
    for site, wanted in zip(("ann", "cid"), expected, strict=True):
        torch.testing.assert_close(found[site], wanted, rtol=1e-4, atol=1e-6)
    _same_gradients(spoilt, clean)
    assert len(spoilt) == len(clean) == 0


def _same_gradients(one: MiddleWorker, other: MiddleWorker) -> None:
    pairs = zip(one._middle.parameters(), other._middle.parameters(), strict=True)
    for mine, theirs in pairs:
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_pass_that_fails_is_tried_for_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory is there for one site's share, and not for all: nothing counts twice."""
    short, plain = (MiddleWorker(part, most=2) for part in middles(model(), 2))
    forwards = [Forward(n, 1, *drawn(at, 4)) for at, n in enumerate(("ann", "bob"))]
    backs = [Backward(f.site, 1, drawn(9, 4)[0]) for f in forwards]
    forward, backward = short._forward, short._backward
    failed: list[str] = []

    def scarce(work: Any) -> Any:
        def tried(*given: Any) -> Any:
            members: Sequence[Any] = given[0] if isinstance(given[0], list) else given[1]
            if len(members) > 1:
                failed.append(work.__name__)
                raise MemoryError("no memory left")
            return work(*given)

        return tried

    monkeypatch.setattr(short, "_backward", scarce(backward))
    short.forward_all(forwards)
    plain.forward_all(forwards)
    for got, wanted in zip(short.backward_all(backs), plain.backward_all(backs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(short, "_forward", scarce(forward))
    again = [one._replace(key=2) for one in forwards]
    for got, wanted in zip(short.forward_all(again), plain.forward_all(again), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    _same_gradients(short, plain)
    assert failed == ["_backward", "_forward"]


@pytest.mark.parametrize("in_wave", ["backward", "forward"])
@pytest.mark.parametrize("when", ["while another pass computes", "before it computes"])
def test_a_site_that_leaves_in_mid_wave_takes_nobody_with_it(when: str, in_wave: str) -> None:
    round_ = client_batch([model().middle], ["ann", "bob", "cid"], settings(wait_s=0.05))
    worker = round_._trainer.worker  # type: ignore[attr-defined]
    forward_all, left = worker.forward_all, threading.Event()
    with linked(round_, "bob") as bob, linked(round_, "cid") as cid:
        for asked in [bob.forward(1, *question()), cid.forward(1, *question())]:
            asked.result(timeout=20)
        round_._settings = settings(wait_s=1.0)  # type: ignore[attr-defined]
        with linked(round_, "ann") as ann:

            def leaves() -> None:
                round_.absent("bob", "it failed")
                left.set()

            def slow(asked: Any) -> Any:
                found = forward_all(asked)
                if not left.is_set():
                    threading.Thread(target=leaves).start()
                    time.sleep(0.05)  # it is gone, and its graphs are to be freed after this pass
                return found

            tried = round_._tried  # type: ignore[attr-defined]

            def late(work: Any, asked: Any) -> Any:
                if when == "before it computes" and not left.is_set():
                    leaves()
                return tried(work, asked)

            worker.forward_all = slow
            round_._tried = late  # type: ignore[attr-defined]
            if in_wave == "backward":
                lost = bob.backward(1, question()[0])
            else:
                lost = bob.forward(2, *question())
            kept = [cid.backward(1, question()[0]), ann.forward(1, *question())]
            for asked in kept:
                asked.result(timeout=20)
            with pytest.raises(SplitError, match=r"it failed|left the round"):
                lost.result(timeout=20)
            until = time.monotonic() + 10
            while worker.under_way("bob") and time.monotonic() < until:
                time.sleep(0.005)
            assert worker.under_way("bob") == 0  # nor is memory kept for it
            assert round_.dropped == {"bob": "it failed"}


def test_a_step_without_a_finite_gradient_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    middle = model().middle
    trainer = Trainer(middle, settings(train=ADAM))
    before = copy.deepcopy(middle.state_dict())
    parameters = list(middle.parameters())
    for value in (torch.inf, torch.nan):
        parameters[0].grad = torch.full_like(parameters[0], value)
        parameters[1].grad = torch.ones_like(parameters[1])
        trainer.step(1)
    assert trainer.steps == 0 and "its gradient is not finite" in caplog.text
    assert all(torch.equal(one, before[name]) for name, one in middle.state_dict().items())
    parameters[1].grad = torch.ones_like(parameters[1])
    trainer.step(1)
    assert trainer.steps == 1


def test_replicas_whose_sites_never_trained_are_left_out() -> None:
    parts = model()
    round_ = hierarchical(middles(parts, 2), ["ann", "bob"], settings())
    with linked(round_, "ann") as ann:
        ann.forward(1, *question()).result(timeout=20)
        ann.backward(1, question()[0]).result(timeout=20)
        ann.step(1).result(timeout=20)
    assert len(round_.finish()) == 1
    nobody = hierarchical(middles(parts, 2), [], settings())
    with linked(nobody, "eve") as eve, pytest.raises(SplitError, match="a site of this round"):
        eve.forward(1, *question()).result(timeout=20)
    assert nobody.finish() == []
