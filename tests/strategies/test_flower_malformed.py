"""The strategy against sites that send what they should not, or too often."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, Error, Message

from strategies import registry
from strategies.flower import RoundError
from strategies.messages import to_record
from tests.fakes import Answer
from tests.strategies.federation import (
    NODES,
    PAIRED,
    Bench,
    Spoil,
    federation,
    filled,
    honest,
    spoiling,
    with_arrays,
    with_report,
    with_tensor,
)


def with_raw(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Spoil:
    array = Array(dtype, shape, "florilegium.raw", data)
    return with_arrays(lambda arrays: {**arrays, name: array})


def without_field(name: str) -> Spoil:
    return lambda answer: replace(
        answer, report={k: v for k, v in (answer.report or {}).items() if k != name}
    )


def big(answer: Answer) -> Answer:
    return replace(answer, more={"luggage": to_record({"x": torch.zeros(100_000)})})


MALFORMED: dict[str, tuple[Spoil, str, str]] = {
    # what is wrong: (how, status, start of the reason)
    "nothing at all": (lambda a: Answer(), "quarantined", "wrong-round"),
    "no report": (lambda a: replace(a, report=None), "quarantined", "wrong-round"),
    "an empty report": (lambda a: replace(a, report={}), "quarantined", "wrong-round"),
    "no arrays record": (lambda a: replace(a, arrays=None), "quarantined", "missing-key"),
    "no arrays": (lambda a: replace(a, arrays={}), "quarantined", "missing-key"),
    "missing key": (
        with_arrays(lambda d: {k: d[k] for k in d if k != "b"}), "quarantined", "missing-key"),
    "misnamed key": (
        with_arrays(lambda d: {"B" if k == "b" else k: v for k, v in d.items()}), "quarantined",
        "missing-key"),
    "extra key": (with_tensor("d", torch.zeros(1)), "quarantined", "extra-key"),
    "reordered keys": (
        with_arrays(lambda d: {k: d[k] for k in reversed(d)}), "quarantined",
        "reordered-keys"),
    "transposed": (with_tensor("a", torch.zeros(3, 2)), "quarantined", "wrong-shape"),
    "flattened": (with_tensor("a", torch.zeros(6)), "quarantined", "wrong-shape"),
    "would broadcast (1,)": (with_tensor("b", torch.ones(1)), "quarantined", "wrong-shape"),
    "would broadcast ()": (with_tensor("b", torch.ones(())), "quarantined", "wrong-shape"),
    "would broadcast (1, 3)": (with_tensor("a", torch.ones(1, 3)), "quarantined", "wrong-shape"),
    "scalar as vector": (with_tensor("c", torch.ones(1)), "quarantined", "wrong-shape"),
    "negative side": (with_raw("b", "float32", (-4,), bytes(16)), "quarantined", "wrong-shape"),
    "half precision": (
        with_tensor("b", torch.zeros(4, dtype=torch.float16)), "quarantined", "wrong-dtype"),
    "double precision": (with_raw("b", "float64", (4,), bytes(32)), "quarantined", "wrong-dtype"),
    "dtype object": (with_raw("b", "object", (4,), bytes(16)), "quarantined", "wrong-dtype"),
    "numpy's own format": (
        with_arrays(lambda d: {**d, "b": Array(np.zeros(4, np.float32))}), "quarantined",
        "malformed-bytes"),
    "bytes cut off": (with_raw("b", "float32", (4,), bytes(15)), "quarantined", "malformed-bytes"),
    "bytes left over": (
        with_raw("b", "float32", (4,), bytes(17)), "quarantined", "malformed-bytes"),
    "NaN": (filled(math.nan), "quarantined", "not-finite"),
    "Inf": (filled(math.inf), "quarantined", "not-finite"),
    "-Inf": (filled(-math.inf), "quarantined", "not-finite"),
    "absurd norm": (filled(1e6), "quarantined", "norm"),
    "norm whose square overflows": (filled(3e38), "quarantined", "norm"),
    "negative examples": (with_report(num_examples=-5), "quarantined", "num-examples"),
    "zero examples": (with_report(num_examples=0), "quarantined", "num-examples"),
    "NaN examples": (with_report(num_examples=math.nan), "quarantined", "num-examples"),
    "infinite examples": (with_report(num_examples=math.inf), "quarantined", "num-examples"),
    "huge examples": (with_report(num_examples=10**15), "quarantined", "num-examples"),
    "examples as a fraction": (with_report(num_examples=7.5), "quarantined", "num-examples"),
    "examples as a truth": (with_report(num_examples=True), "quarantined", "num-examples"),
    "examples as text": (with_report(num_examples="77"), "quarantined", "num-examples"),
    "examples as a list": (with_report(num_examples=[77]), "quarantined", "num-examples"),
    "examples left out": (without_field("num-examples"), "quarantined", "num-examples"),
    "round before": (with_report(round=0), "quarantined", "wrong-round"),
    "round to come": (with_report(round=7), "quarantined", "wrong-round"),
    "round as text": (with_report(round="1"), "quarantined", "wrong-round"),
    "round as a truth": (with_report(round=True), "quarantined", "wrong-round"),
    "round left out": (without_field("round"), "quarantined", "wrong-round"),
    "another layout": (with_report(layout="0" * 64), "quarantined", "layout"),
    "layout left out": (without_field("layout"), "quarantined", "layout"),
    "oversized array": (
        with_raw("b", "float32", (4,), bytes(200_000)), "quarantined", "oversized"),
    "oversized record beside": (big, "quarantined", "oversized"),
    "oversized text": (with_report(worker="x" * 200_000), "quarantined", "oversized"),
    "says that it failed": (with_report(error="disk is full"), "failed", "disk is full"),
    "raised": (lambda a: Answer(error=Error(2, "out of memory")), "failed", "out of memory"),
    "raised without a reason": (lambda a: Answer(error=Error(2)), "failed", "Flower's error code"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_reply_is_set_aside_and_the_rest_keep_their_bits(
    fault: str, bench: Bench
) -> None:
    spoil, status, reason = MALFORMED[fault]
    options = {"server_optimizer": "adam", "fraction": 1.0}
    alone, _ = bench.run(federation("ann", "bob", "zoe"), **options)  # type: ignore[arg-type]
    grid = federation("ann", "bob", "zoe", eve=spoiling("eve", spoil))
    got, log = bench.run(grid, **options)  # type: ignore[arg-type]
    assert got == alone
    for round_ in (1, 2):
        eve = log.of("eve", round_)
        assert eve.status == status
        assert eve.reason.startswith(reason) and len(eve.reason) <= 2000
        honest_ones = [s for s in log.rounds[round_ - 1].sites if s.site != "eve"]
        assert [(s.status, s.reason) for s in honest_ones] == [("ok", "")] * 3


REPLIES = [spoil for spoil, status, _ in MALFORMED.values() if status == "quarantined"]
CHAINS = [
    *({"rule": name} for name in sorted(registry.RULES)),
    *({"pre": name} for name in sorted(registry.PRE)),
]


def every_fault(question: Message) -> Iterable[Answer]:
    """Sends one reply of each malformed kind."""
    for answer in honest("eve")(question):
        training = question.metadata.message_type == "train"
        yield from (spoil(answer) for spoil in REPLIES) if training else [answer]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(map("=".join, chain.items())))
def test_every_chain_sees_the_honest_ones_alone(chain: dict[str, str], bench: Bench) -> None:
    bench.layout = PAIRED
    options = {**chain, "clip_norm": 2.0}
    others = ("ann", "bob", "cid", "dee", "fay", "gus", "zoe")  # enough for Bulyan with one liar
    alone, _ = bench.run(federation(*others), num_byzantine=1, **options)  # type: ignore[arg-type]
    grid = federation(*others, eve=every_fault)
    got, log = bench.run(grid, num_byzantine=1, **options)  # type: ignore[arg-type]
    assert got == alone and log.of("eve").status == "quarantined"


def test_a_site_that_is_caught_counts_as_a_liar_where_too_few_are_left(bench: Bench) -> None:
    def run(spoil: Spoil | None, f: int) -> bytes:
        others = {} if spoil is None else {"eve": spoiling("eve", spoil)}
        grid = federation("ann", "bob", "zoe", **others)
        return bench.run(grid, rule="trimmed-mean", num_byzantine=f)[0]

    caught, failed = (MALFORMED[fault][0] for fault in ("NaN", "raised"))
    assert run(None, 1) != run(None, 0)
    # She may have been an honest one, so that three sites still bear the one liar they can.
    assert run(caught, 1) == run(None, 1) and run(failed, 1) == run(None, 1)
    assert run(caught, 2) == run(None, 1)
    with pytest.raises(RoundError, match="num-byzantine=2"):
        run(failed, 2)
    with pytest.raises(RoundError, match="num-byzantine=3"):
        run(caught, 3)


def test_a_round_with_too_few_updates_for_its_rule_says_who_is_missing_and_how_to_go_on(
    bench: Bench,
) -> None:
    grid = federation("ann", "bob", zoe=spoiling("zoe", MALFORMED["raised"][0]))
    wanted = (
        r"^Expected updates that trimmed-mean\+none can aggregate in round 1, but: Expected "
        r"strategy.num-byzantine=1 to be at most 0 \(n=2 needs n ≥ 2f\+1\); lower it or add "
        r"sites\. Not among them: zoe: out of memory\. "
        r"Finished rounds are safe: .*run.resume='latest'"
    )
    with pytest.raises(RoundError, match=wanted):
        bench.run(grid, rule="trimmed-mean", num_byzantine=1)
    # Of three liars one is out: with two updates left none of the others may lie.
    grid = federation("ann", "bob", eve=spoiling("eve", MALFORMED["NaN"][0]))
    wanted = (
        r"num-byzantine=3 to be at most 1 \(n=2 .*, where 1 of the f are quarantined\).*eve: not"
    )
    with pytest.raises(RoundError, match=wanted):
        bench.run(grid, rule="median", pre="nnm", num_byzantine=3)


def test_an_honest_fourth_site_does_change_the_result(bench: Bench) -> None:
    # Without this the test above could not fail.
    assert bench.run(federation())[0] != bench.run(federation("ann", "bob", "zoe"))[0]


def test_harmless_oddities_of_a_report_are_let_through(bench: Bench) -> None:
    odd = with_report(worker="", extra=[1, 2], empty=[], raw=b"", big=2**62, nan=math.nan)
    got, log = bench.run(federation("ann", "bob", "zoe", eve=spoiling("eve", odd)))
    assert got == bench.run(federation())[0]
    assert log.of("eve").status == "ok"
    assert "extra" not in log.of("eve").report


def test_a_failing_reason_is_kept_short(bench: Bench) -> None:
    for spoil in (
        with_report(error="x" * 100_000),
        lambda a: Answer(error=Error(2, "x" * 100_000)),
    ):
        _, log = bench.run(federation("ann", "bob", eve=spoiling("eve", spoil)))
        assert log.of("eve").status == "failed" and len(log.of("eve").reason) == 2000


def test_of_two_good_replies_of_a_site_the_first_counts(bench: Bench) -> None:
    def twice(question: Message) -> Iterable[Answer]:
        for answer in honest("eve")(question):
            yield answer
            if question.metadata.message_type == "train":
                yield with_tensor("b", torch.full((4,), 9.0))(answer)

    # In the order of sending, or the grid's shuffling would decide which one is the first.
    grid = federation("ann", "bob", "zoe", eve=twice)
    grid._draw.shuffle = lambda items: None  # type: ignore[method-assign, assignment]
    got, log = bench.run(grid)
    assert got == bench.run(federation())[0]
    assert log.of("eve").status == "ok"
    assert log.of("eve").reason.startswith("duplicate: Expected one reply from 'eve'")


@pytest.mark.parametrize("seed", range(4))
def test_a_bad_reply_beside_a_good_one_of_the_same_site_does_no_harm(
    bench: Bench, seed: int
) -> None:
    def both(question: Message) -> Iterable[Answer]:
        for answer in honest("eve")(question):
            if question.metadata.message_type == "train":
                yield with_report(round=0)(answer)  # a straggler of an earlier round
            yield answer

    got, log = bench.run(federation("ann", "bob", "zoe", eve=both, seed=seed))
    assert got == bench.run(federation())[0]
    assert log.of("eve").status == "ok"


@pytest.mark.parametrize("stranger", [NODES["eve"], 123456, 0])
def test_a_node_that_was_not_asked_is_not_heard(bench: Bench, stranger: int) -> None:
    def echo(question: Message) -> Iterable[Answer]:
        for answer in honest("bob")(question):
            yield answer
            yield replace(with_tensor("b", torch.ones(4))(answer), node=stranger)

    got, log = bench.run(federation("ann", "zoe", bob=echo))
    assert got == bench.run(federation("ann", "bob", "zoe"))[0]
    assert [s.site for s in log.rounds[0].sites] == ["ann", "bob", "zoe"]
