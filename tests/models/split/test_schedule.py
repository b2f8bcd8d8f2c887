"""Schedules of a split round: what they compute does not depend on who comes when."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock, get_ident
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import PayloadConfig, TrainConfig
from models.split import Parts, cut, schedule
from models.split.adapter import factors
from models.split.cut import Middle
from models.split.load import SERVER, Cuts, load_parts
from models.split.middle import Backward, Forward, MiddleWorker
from models.split.schedule import Round, auto, client_batch, hierarchical, sequential
from models.split.step import SplitError
from tests.models.split.families import tiny
from tests.models.split.sites import (
    PLAIN,
    RATE,
    in_threads,
    linked,
    middles,
    settings,
    stream,
    train_over,
)
from tests.models.split.test_step import NO_DROPOUT

pytestmark = pytest.mark.usefixtures("one_thread")
ADAM = TrainConfig(optimizer="adamw", max_grad_norm=0.5, grad_accumulation=2, precision="float32")
NAMES = ("ann", "bob", "cid")
FULL = dict.fromkeys(("tie_word_embeddings",), False)


def model(family: str = "llama") -> Parts:
    return cut(tiny(family, **FULL, **NO_DROPOUT))


def question(key: int = 1, tokens: int = 3) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, tokens, 32) + key, torch.ones(1, tokens, dtype=torch.int64)


def trained(
    schedule: Callable[..., Round], parts: Parts, *, names: Sequence[str] = NAMES,
    replicas: int = 1, order: Sequence[int] = (0, 1, 2), in_flight: int = 1, **keys: Any,
) -> tuple[list[dict[str, Tensor]], list[float], Round]:  # fmt: skip
    """What the middles learnt and each site's loss, the sites starting in the given order."""
    given = settings(**keys)
    round_ = schedule(middles(parts, replicas), names, given)
    ends = [copy.deepcopy(parts) for _ in names]

    def run(at: int) -> float:
        with linked(round_, names[at]) as link:
            steps = partial(train_over, link, ends[at], stream("llama", at), config=given.train)
            return float(steps(in_flight=in_flight).loss)

    found = dict(zip(order, in_threads([partial(run, at) for at in order]), strict=True))
    losses = [found[at].result(timeout=60) for at in range(len(names))]
    return [each.tensors for each in round_.finish()], losses, round_


def same(first: dict[str, Tensor], second: dict[str, Tensor], within: float = 0.0) -> None:
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=within)


def close(found: Tensor | None, expected: Tensor | None) -> None:
    """Within 1e-5 of the largest, or of one."""
    assert found is not None and expected is not None
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def drawn(seed: int, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[-1, tokens - 2 :] = 0
    return torch.randn(rows, tokens, 32, generator=generator), mask


@pytest.mark.parametrize("family", ["llama", "gpt2", "glm", "bert"])
def test_joined_is_separate(family: str) -> None:
    joined, apart = (MiddleWorker(part, most=1) for part in middles(model(family), 2))
    given = [drawn(at, *shape) for at, shape in enumerate([(2, 9), (1, 5), (3, 7)])]
    forwards = [Forward(n, 7, *one) for n, one in zip(NAMES, given, strict=True)]
    backs = [Backward(f.site, 7, drawn(9, *f.mask.shape)[0]) for f in forwards]
    together = joined.forward_all(forwards)
    assert (joined.passes, joined.tokens, joined.padding) == (1, 6 * 9, 4 + 6)
    before = joined.backward_all(backs)
    for at, (forward, back) in enumerate(zip(forwards, backs, strict=True)):
        alone = apart.forward(forward.site, 7, forward.hidden, forward.mask)
        own = forward.mask.bool()
        torch.testing.assert_close(together[at][own], alone[own], rtol=0, atol=1e-5)
        gradient = apart.backward(back.site, 7, back.gradient)
        close(before[at], gradient)
    for one, other in zip(joined._middle.parameters(), apart._middle.parameters(), strict=True):
        if other.grad is not None:
            close(one.grad, other.grad)
    assert len(joined) == 0


def test_gradients_of_a_joined_pass_may_come_apart() -> None:
    whole, parted = (MiddleWorker(part, most=2) for part in middles(model(), 2))
    forwards = [Forward(name, 1, *drawn(at, 1, 4 + at)) for at, name in enumerate(NAMES)]
    backs = [Backward(f.site, 1, drawn(9, *f.mask.shape)[0]) for f in forwards]
    for worker in (whole, parted):
        worker.forward_all(forwards)
    parted.forget("bob")
    expected = whole.backward_all([backs[0], backs[2]])
    found = [parted.backward_all([back])[0] for back in (backs[2], backs[0])]
    torch.testing.assert_close(found[::-1], expected, rtol=0, atol=1e-6)
    for one, other in zip(whole._middle.parameters(), parted._middle.parameters(), strict=True):
        close(one.grad, other.grad)
    assert (len(whole), len(parted)) == (1, 0)


@pytest.mark.parametrize("config", [PLAIN, ADAM], ids=["sgd", "adamw"])
def test_turns_go_by_name_and_start_fresh(config: TrainConfig) -> None:
    parts = model()
    (found,), losses, round_ = trained(sequential, parts, order=(2, 1, 0), train=config)
    middle = [copy.deepcopy(parts.middle)]
    for at, name in enumerate(NAMES):  # one round each: a new optimiser, the same weights
        alone = sequential(middle, [name], settings(train=config))
        with linked(alone, name) as link:
            site = train_over(link, copy.deepcopy(parts), stream("llama", at), config=config)
        assert site.loss == losses[at]
        (expected,) = alone.finish()
    same(found, expected.tensors)
    assert round_.steps == 9 and not round_.dropped


def by_hand(parts: Parts, count: int, steps: int = 3) -> dict[str, Tensor]:
    """Client-batch training with plain gradient steps: one middle per site, gradients averaged."""
    copies = [copy.deepcopy(parts) for _ in range(count)]
    streams = [stream("llama", at) for at in range(count)]
    for _ in range(steps):
        for one, batches in zip(copies, streams, strict=True):
            micro = list(itertools.islice(batches, 2))
            total = sum(batch.counted for batch in micro)
            for batch in micro:
                mask = batch.inputs["attention_mask"]
                hidden = one.middle(one.head(batch.inputs["input_ids"], mask), mask)
                loss = one.tail.output(hidden, mask, labels=batch.inputs["labels"]).loss
                (loss * batch.counted / total).backward()
        lists = [list(one.middle.parameters()) for one in copies]
        for same_ones in zip(*lists, strict=True):
            mean = sum(p.grad for p in same_ones if p.grad is not None) / count
            for parameter in same_ones:
                parameter.grad = torch.as_tensor(mean).clone()
        for one in copies:
            every = {id(p): p for part in one for p in part.parameters()}.values()
            torch.optim.SGD(every, lr=RATE).step()
            for parameter in every:
                parameter.grad = None
    return factors(copies[0].middle)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_client_batch_takes_steps_on_the_mean_of_all_sites(in_flight: int) -> None:
    parts = model()
    (found,), _, round_ = trained(client_batch, parts, in_flight=in_flight)
    same(found, by_hand(parts, 3), within=1e-5)
    report = round_.report()
    assert round_.steps == 3 and report["joined"] == 3.0
    assert report["peak-graphs"] == 3 * in_flight and 0 < report["padding"] < 0.2


def test_client_batch_has_the_same_bits_whoever_comes_first() -> None:
    parts = model()
    first, second = (
        trained(client_batch, parts, order=order, in_flight=2, join_tokens=54, train=ADAM)
        for order in ((0, 1, 2), (2, 0, 1))
    )
    same(first[0][0], second[0][0])
    assert first[1] == second[1]
    assert 1 < first[2].report()["joined"] < 3  # not all three fit into one pass


def test_replicas_share_the_sites_in_turn() -> None:
    parts = model()
    found, losses, round_ = trained(hierarchical, parts, replicas=2)
    assert len(found) == 2 and round_.steps == 6
    expected, own, _ = trained(client_batch, parts, names=("ann", "cid"), order=(0, 1), replicas=1)
    # "cid" reads another stream there: compare where the site is alone.
    alone, loss, _ = trained(client_batch, parts, names=("ann",), order=(0,))
    assert expected and own[0] != losses[2] and loss[0] != losses[1]
    single, single_loss, _ = trained(hierarchical, parts, names=("ann",), order=(0,), replicas=3)
    assert len(single) == 1 and single_loss == loss
    same(single[0], alone[0])


@pytest.mark.parametrize(
    ("names", "sites"), [("ann bob cid", [2, 1]), ("ann bob", [1, 1]), ("ann cid", [2])]
)
def test_a_replica_says_how_many_sites_trained_on_it(names: str, sites: list[int]) -> None:
    parts = model()
    round_ = hierarchical(middles(parts, 2), NAMES, settings())
    for name in set(NAMES) - set(names.split()):
        round_.absent(name, "it is not there")

    def run(name: str) -> None:
        with linked(round_, name) as link:
            train_over(link, copy.deepcopy(parts), stream("llama", 0))

    for done in in_threads([partial(run, name) for name in names.split()]):
        done.result(timeout=60)
    assert [each.sites for each in round_.finish()] == sites


def test_replicas_without_gpus_are_those_of_separate_rounds() -> None:
    parts = model()
    found, losses, _ = trained(hierarchical, parts, replicas=3)
    for at, name in enumerate(NAMES):
        alone = client_batch(middles(parts, 1), [name], settings())
        with linked(alone, name) as link:
            site = train_over(link, copy.deepcopy(parts), stream("llama", at))
        assert site.loss == losses[at]
        same(found[at], alone.finish()[0].tensors)


def test_dropout_repeats_with_the_seed_in_all_replicas() -> None:
    middle = cut(tiny("gpt2", **NO_DROPOUT | {"resid_pdrop": 0.5})).middle.train()
    hidden, mask = drawn(0, 3, 9)

    def run(seed: int) -> list[Tensor]:
        drawing = Lock()
        workers = [MiddleWorker(middle, most=9, seed=seed, drawing=drawing) for _ in range(3)]

        def twice(worker: MiddleWorker) -> Tensor:
            return torch.stack([worker.forward("ann", key, hidden, mask) for key in range(2)])

        found = in_threads([partial(twice, worker) for worker in workers])
        return [future.result(timeout=20) for future in found]

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(*first[0])
    assert not MiddleWorker(model("gpt2").middle, most=1)._draws


def test_only_what_is_asked_for_is_trained(tmp_path: Any) -> None:
    tiny("llama").save_pretrained(tmp_path)
    lora = PayloadConfig(rank=2)
    for what, count in (("lora", 28), ("none", 0)):
        middle = load_parts(tmp_path, SERVER, Cuts(), payload=lora)["middle"]
        assert isinstance(middle, Middle)
        round_ = sequential([middle], ["ann"], settings(trains=what))
        with linked(round_, "ann") as link:
            behind = link.forward(1, *question()).result(timeout=20)
            link.backward(1, torch.ones_like(behind)).result(timeout=20)
            link.step(1).result(timeout=20)
        ((tensors, _),) = round_.finish()
        assert len(tensors) == count and all("lora_" in name for name in tensors)
        moved = [name for name, t in tensors.items() if "lora_B" in name and bool(t.any())]
        assert len(moved) == count // 2


def test_held_out_rows_are_answered_outside_turns_and_steps() -> None:
    for schedule_ in (sequential, client_batch):
        round_ = schedule_([model().middle], ["ann", "bob"], settings(wait_s=20.0))
        with linked(round_, "ann") as ann, linked(round_, "bob") as bob:
            asked = [ann.forward(1, *question()), bob.score(1, *question())]
            behind = bob.score(2, *question()).result(timeout=20)
            if schedule_ is client_batch:  # "bob" has yet to begin, and is waited for
                assert not asked[0].done()
                asked.append(bob.forward(3, *question()))
            for one in asked:
                torch.testing.assert_close(one.result(timeout=20), behind, rtol=0, atol=1e-6)


def test_whoever_has_trained_and_scores_is_not_waited_for() -> None:
    round_ = client_batch([model().middle], ["ann", "bob"], settings(wait_s=20.0))
    with linked(round_, "ann") as ann, linked(round_, "bob") as bob:
        for link in (ann, bob):
            link.forward(1, *question())
            link.backward(1, question()[0])
            link.step(1)
        bob.score(2, *question()).result(timeout=5)
        ann.forward(2, *question()).result(timeout=5)
        ann.backward(2, question()[0]).result(timeout=5)
        ann.step(2).result(timeout=5)
    assert round_.steps == 2 and not round_.dropped


@pytest.mark.parametrize(
    ("shared_s", "faster"), [(2.0, "client-batch"), (1.0, "client-batch"), (0.5, "hierarchical")]
)
def test_auto_takes_what_was_faster(
    monkeypatch: pytest.MonkeyPatch, shared_s: float, faster: str
) -> None:
    taken = iter([1.0, shared_s])

    def timed(work: Callable[[], object]) -> float:
        work()
        return next(taken)

    monkeypatch.setattr(schedule, "_best", timed)
    parts = model()
    replicas = middles(parts, 2)
    choice = auto(replicas, NAMES, settings(), rows=2, tokens=10)
    assert choice.schedule == faster
    assert choice.seconds == {"client-batch": 1.0 / 60, "hierarchical": shared_s / 60}
    assert f"{faster}: microseconds per token of the middle were client-batch 16666" in str(choice)
    for one, other in zip(replicas, middles(parts, 2), strict=True):
        same(factors(one), factors(other))
        assert all(p.grad is None for p in one.parameters())


def test_auto_measures_time() -> None:
    choice = auto(middles(model(), 2), NAMES, settings(), rows=2, tokens=10)
    assert set(choice.seconds) == {"client-batch", "hierarchical"}
    assert choice.seconds[choice.schedule] == min(choice.seconds.values())
    assert all(1e-8 < value < 1 for value in choice.seconds.values())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda link: link.step(1), "STEP of 'ann' with 1 micro-batches under way"),
        (lambda link: link.forward(1, *question()), "got 1 of 'ann' twice"),
        (lambda link: link.backward(2, question()[0]), "under way, got 2 of 'ann'"),
        (lambda link: link.backward(1, question(1, 2)[0]), r"shape \(1, 3, 32\) from 'ann'"),
    ],
)
def test_questions_out_of_order_end_the_stream(ask: Callable[..., Any], message: str) -> None:
    for schedule_ in (sequential, client_batch):
        round_ = schedule_([model().middle], ["ann"], settings())
        with linked(round_, "ann") as link:
            link.forward(1, *question()).result(timeout=20)
            with pytest.raises(SplitError, match=message):
                ask(link).result(timeout=20)
        assert message.split("\\", maxsplit=1)[0] in round_.dropped["ann"] or "shape" in message
        assert len(round_._trainer.worker) == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("way", "replicas"), [(sequential, 1), (client_batch, 1), (hierarchical, 2)]
)
def test_each_middle_is_computed_in_one_thread(
    way: Callable[..., Round], replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes leave behind would lie in the memory of every stream's thread else."""
    seen: dict[MiddleWorker, set[int]] = {}
    for name in ("_forward", "_backward"):
        real = getattr(MiddleWorker, name)

        def computed(worker: MiddleWorker, *given: Any, real: Any = real) -> Any:
            seen.setdefault(worker, set()).add(get_ident())
            return real(worker, *given)

        monkeypatch.setattr(MiddleWorker, name, computed)
    trained(way, model(), replicas=replicas)
    assert [len(threads) for threads in seen.values()] == [1] * replicas
