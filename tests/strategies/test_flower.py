"""The strategy against sites of all kinds: order, malformed replies, quorum, deadline, resuming."""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from models.seeds import derive
from strategies import cohort, messages, registry
from strategies.config import StrategyConfig
from strategies.flower import ComposedStrategy, RoundError, RoundOutcome
from strategies.messages import SiteOutcome, decode_all, to_record
from strategies.sampling import Selection
from tests.fakes import Answer, FakeGrid, Field, Site, at_the_server, silent

LAYOUT = Layout(("a", "b", "c"), ((2, 3), (4,), ()))
START = LAYOUT.unflatten(torch.linspace(-1, 1, LAYOUT.size))
NODES = {"ann": 907, "bob": 13, "eve": 44, "zoe": 5}
EXAMPLES = {"ann": 120, "bob": 33, "eve": 77, "zoe": 1}
Spoil = Callable[[Answer], Answer]


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(messages, "_POLL_S", 0.001)  # look often
    with at_the_server():
        yield


def honest(site: str) -> Site:
    """Sends an update that depends on site, round and payload, so that a wrong one shows later."""

    def answer(question: Message) -> Iterable[Answer]:
        received = decode_all(question.content.array_records["arrays"])
        plan = question.content.config_records["plan"]
        report: dict[str, object] = {"before-loss-sum": 2.5, "before-counted": 2}
        if question.metadata.message_type == "evaluate":
            yield Answer(report=dict(report))  # type: ignore[arg-type]
            return
        round_ = int(str(plan["round"]))
        generator = torch.Generator().manual_seed(derive(0, site, round_))
        delta = {
            name: torch.randn(tensor.shape, generator=generator) - 0.3 * tensor
            for name, tensor in received.items()
        }
        report |= {"round": round_, "layout": LAYOUT.digest, "num-examples": EXAMPLES[site]}
        yield Answer(dict(to_record(delta)), dict(report))  # type: ignore[arg-type]

    return answer


def spoiling(site: str, spoil: Spoil) -> Site:
    """An honest site whose training replies are spoilt."""

    def answer(question: Message) -> Iterable[Answer]:
        answers = honest(site)(question)
        return map(spoil, answers) if question.metadata.message_type == "train" else answers

    return answer


@dataclass
class Log:
    """A listener that keeps everything."""

    rounds: list[RoundOutcome] = field(default_factory=list)
    evaluations: list[tuple[int, list[SiteOutcome]]] = field(default_factory=list)

    def round_finished(self, outcome: RoundOutcome) -> None:
        self.rounds.append(outcome)

    def evaluated(self, round_: int, sites: Sequence[SiteOutcome]) -> None:
        self.evaluations.append((round_, list(sites)))

    def of(self, site: str, round_: int = 1) -> SiteOutcome:
        return next(s for s in self.rounds[round_ - 1].sites if s.site == site)


def federation(*names: str, seed: int = 0, **others: Site) -> FakeGrid:
    """Honest sites by name, and others with the behaviour given."""
    sites = {NODES[name]: honest(name) for name in names or NODES}
    return FakeGrid(sites | {NODES[name]: site for name, site in others.items()}, seed=seed)


@dataclass
class Bench:
    """Runs the strategy over a grid in a folder of its own."""

    folder: Path

    def strategy(
        self,
        log: Log,
        *,
        quorum: float = 0.5,
        selection: Selection | None = None,
        **options: object,
    ) -> ComposedStrategy:
        config = StrategyConfig.model_validate(options)
        names = {node: name for name, node in NODES.items()}
        return ComposedStrategy(
            config,
            registry.build(config),
            LAYOUT,
            seed=3,
            quorum=quorum,
            members=lambda grid, done: {names[node]: node for node in grid.get_node_ids()},
            plan=lambda round_, site: {"for": site},
            spool=self.folder / "spool",
            listener=log,
            selection=selection,
        )

    def run(
        self, grid: FakeGrid, rounds: int = 2, timeout: float = 20.0, **options: object
    ) -> tuple[bytes, Log]:
        log = Log()
        strategy = self.strategy(log, **options)  # type: ignore[arg-type]
        result = strategy.start(grid, to_record(START), num_rounds=rounds, timeout=timeout)
        return to_bytes(decode_all(result.arrays)), log


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def to_bytes(payload: Mapping[str, Tensor]) -> bytes:
    return LAYOUT.flatten(payload).numpy().tobytes()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32),
    late=st.fixed_dictionaries({name: st.integers(0, 4) for name in NODES}),
    optimizer=st.sampled_from(sorted(registry.SERVER_OPTIMIZERS)),
)
def test_result_has_the_same_bits_in_any_order_of_replies(
    bench: Bench, seed: int, late: dict[str, int], optimizer: str
) -> None:
    expected, _ = bench.run(federation(), server_optimizer=optimizer)
    delayed = {name: spoiling(name, partial(replace, late=late[name])) for name in NODES}
    got, log = bench.run(federation(seed=seed, **delayed), server_optimizer=optimizer)
    assert got == expected
    assert [s.site for s in log.rounds[0].sites] == sorted(NODES)
    assert all(s.status == "ok" for round_ in log.rounds for s in round_.sites)


def with_arrays(change: Callable[[dict[str, Array]], dict[str, Array]]) -> Spoil:
    return lambda answer: replace(answer, arrays=change(dict(answer.arrays or {})))


def with_tensor(name: str, value: Tensor) -> Spoil:
    return with_arrays(lambda arrays: {**arrays, name: to_record({name: value})[name]})


def with_raw(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Spoil:
    array = Array(dtype, shape, "florilegium.raw", data)
    return with_arrays(lambda arrays: {**arrays, name: array})


def with_report(**fields: Field) -> Spoil:
    changes = {key.replace("_", "-"): value for key, value in fields.items()}
    return lambda answer: replace(answer, report={**(answer.report or {}), **changes})


def without_field(name: str) -> Spoil:
    return lambda answer: replace(
        answer, report={k: v for k, v in (answer.report or {}).items() if k != name}
    )


def filled(value: float) -> Spoil:
    return with_tensor("b", torch.tensor([0.0, value, 0.0, 0.0]))


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
        with_arrays(lambda d: {k: d[k] for k in ("a", "c")}), "quarantined", "missing-key"),
    "misnamed key": (
        with_arrays(lambda d: {"a": d["a"], "B": d["b"], "c": d["c"]}), "quarantined",
        "missing-key"),
    "extra key": (with_tensor("d", torch.zeros(1)), "quarantined", "extra-key"),
    "reordered keys": (
        with_arrays(lambda d: {k: d[k] for k in ("c", "b", "a")}), "quarantined",
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


PLAIN_RULES = sorted(name for name in registry.RULES if not name.startswith(("lora-", "fltrust")))


@pytest.mark.parametrize("fault", ["NaN", "absurd norm", "huge examples"])
@pytest.mark.parametrize("rule", PLAIN_RULES)
def test_every_rule_sees_the_honest_ones_alone(rule: str, fault: str, bench: Bench) -> None:
    options = {"rule": rule, "num_byzantine": 0, "pre": "nnm"}
    alone, _ = bench.run(federation("ann", "bob", "zoe"), **options)  # type: ignore[arg-type]
    grid = federation("ann", "bob", "zoe", eve=spoiling("eve", MALFORMED[fault][0]))
    got, log = bench.run(grid, **options)  # type: ignore[arg-type]
    assert got == alone and log.of("eve").status == "quarantined"


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


def test_a_round_goes_on_with_those_who_answered(bench: Bench) -> None:
    started = time.monotonic()
    grid = federation("ann", "bob", eve=silent, zoe=silent)
    got, log = bench.run(grid, rounds=2, timeout=0.1, quorum=0.5)
    assert got == bench.run(federation("ann", "bob"))[0]
    assert time.monotonic() - started < 5
    for name in ("eve", "zoe"):
        outcome = log.of(name)
        assert outcome.status == "missing" and "run.deadline-s" in outcome.reason
        assert (outcome.bytes_down, outcome.bytes_up) == (4 * LAYOUT.size, 0)
    assert (log.of("ann").bytes_down, log.of("ann").bytes_up) == (4 * LAYOUT.size,) * 2


def test_a_site_that_a_message_cannot_reach_is_missing_at_once(bench: Bench) -> None:
    grid = federation()
    grid.unsendable = frozenset({NODES["eve"]})
    got, log = bench.run(grid, timeout=60)
    assert got == bench.run(federation("ann", "bob", "zoe"))[0]
    assert log.of("eve").status == "missing"


def test_a_reply_after_the_deadline_is_not_waited_for(bench: Bench) -> None:
    late = spoiling("eve", lambda a: replace(a, late=10**9))
    got, log = bench.run(federation("ann", "bob", "zoe", eve=late), timeout=0.05)
    assert got == bench.run(federation("ann", "bob", "zoe"))[0]
    assert log.of("eve").status == "missing"


@pytest.mark.parametrize(
    ("quorum", "min_sites", "needed"), [(0.75, 1, 3), (0.5, 3, 3), (1.0, 1, 4)]
)
def test_too_few_good_replies_end_the_run_with_names_and_remedy(
    bench: Bench, quorum: float, min_sites: int, needed: int
) -> None:
    nan = spoiling("eve", filled(math.nan))
    grid = federation("ann", "bob", eve=nan, zoe=silent)
    with pytest.raises(RoundError) as error:
        bench.run(grid, timeout=0.05, quorum=quorum, min_sites=min_sites)
    message = str(error.value)
    assert f"at least {needed} of 4 sites to answer well in round 1, got 2" in message
    assert "eve: not-finite" in message and "zoe: No reply" in message
    for word in ("ann", "bob"):
        assert word not in message
    assert "Finished rounds are safe" in message
    assert "run.resume='latest'" in message and "run.quorum" in message


def test_a_quorum_that_is_met_exactly_is_enough(bench: Bench) -> None:
    # 0.28 * 25 is a little more than 7 in floating point.
    nodes = {1000 + i: f"s{i:02}" for i in range(25)}
    config = StrategyConfig()
    log = Log()
    good = {node: honest("ann") for node in list(nodes)[:7]}
    strategy = ComposedStrategy(
        config, registry.build(config), LAYOUT, seed=0, quorum=0.28,
        members=lambda grid, done: {name: node for node, name in nodes.items()},
        plan=lambda round_, site: {}, spool=bench.folder, listener=log,
    )  # fmt: skip
    grid = FakeGrid(dict.fromkeys(nodes, silent) | good)
    strategy.start(grid, to_record(START), num_rounds=1, timeout=0.05)
    assert sum(s.status == "ok" for s in log.rounds[0].sites) == 7


def test_sites_that_went_away_end_the_run_and_say_so(bench: Bench) -> None:
    with pytest.raises(
        RoundError, match=r"min-sites.*got 2 \(ann, bob\).*Finished rounds are safe"
    ):
        bench.run(federation("ann", "bob"), min_sites=3)


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("optimizer", sorted(registry.SERVER_OPTIMIZERS))
def test_a_restored_run_ends_with_the_same_bytes(bench: Bench, optimizer: str, done: int) -> None:
    options = {"server_optimizer": optimizer, "fraction": 0.5, "pre": "clip"}
    whole, log = bench.run(federation(), rounds=4, **options)  # type: ignore[arg-type]
    kept = log.rounds[done - 1]
    resumed = Log()
    strategy = bench.strategy(resumed, **options)  # type: ignore[arg-type]
    strategy.restore(done, {name: tensor.clone() for name, tensor in kept.state.items()})
    result = strategy.start(federation(seed=9), to_record(kept.payload), num_rounds=4, timeout=20)
    assert to_bytes(decode_all(result.arrays)) == whole
    assert [r.round for r in resumed.rounds] == list(range(done + 1, 5))
    for before, after in zip(log.rounds[done:], resumed.rounds, strict=True):
        assert [s.site for s in before.sites] == [s.site for s in after.sites]
        assert to_bytes(before.payload) == to_bytes(after.payload)
        assert before.state.keys() == after.state.keys()
        assert all(torch.equal(before.state[k], after.state[k]) for k in before.state)


@pytest.mark.parametrize("optimizer", sorted(set(registry.SERVER_OPTIMIZERS) - {"none"}))
def test_a_restored_run_needs_the_state(bench: Bench, optimizer: str) -> None:
    whole, log = bench.run(federation(), rounds=3, server_optimizer=optimizer)
    strategy = bench.strategy(Log(), server_optimizer=optimizer)
    strategy.restore(
        1, registry.build(StrategyConfig(server_optimizer=optimizer)).init(LAYOUT.size)
    )
    result = strategy.start(federation(), to_record(log.rounds[0].payload), num_rounds=3)
    assert to_bytes(decode_all(result.arrays)) != whole


def test_a_finished_run_that_is_restored_only_scores_again(bench: Bench) -> None:
    whole, log = bench.run(federation(), rounds=2)
    again = Log()
    strategy = bench.strategy(again)
    strategy.restore(2, log.rounds[-1].state)
    grid = federation()
    result = strategy.start(grid, to_record(log.rounds[-1].payload), num_rounds=2, timeout=20)
    assert to_bytes(decode_all(result.arrays)) == whole
    assert not again.rounds and [round_ for round_, _ in again.evaluations] == [2]
    assert not grid.asked("train")


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_without_server_optimiser_it_is_the_plain_mean(bench: Bench, weighting: str) -> None:
    _, log = bench.run(federation(), rounds=1, weighting=weighting, weight_cap=100)
    credit = {name: min(count, 100) for name, count in EXAMPLES.items()}
    if weighting == "uniform":
        credit = dict.fromkeys(EXAMPLES, 1)
    expected = LAYOUT.flatten(START).double()
    for name in NODES:
        generator = torch.Generator().manual_seed(derive(0, name, 1))
        delta = {k: torch.randn(t.shape, generator=generator) - 0.3 * t for k, t in START.items()}
        expected += LAYOUT.flatten(delta).double() * credit[name] / sum(credit.values())
    got = LAYOUT.flatten(log.rounds[0].payload).double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    moved = float((got - LAYOUT.flatten(START).double()).norm())
    assert log.rounds[0].update_norm == pytest.approx(moved, rel=1e-5)


def test_where_not_every_site_trains_all_score_the_start(bench: Bench) -> None:
    grid = federation()
    _, log = bench.run(grid, rounds=2, fraction=0.5)
    assert [round_ for round_, _ in log.evaluations] == [0, 2]
    assert all([s.site for s in sites] == sorted(NODES) for _, sites in log.evaluations)
    assert len(grid.asked("train")) == 4 and len(grid.asked("evaluate")) == 8
    assert [q.metadata.message_type for q in grid.questions[:4]] == ["evaluate"] * 4


def test_where_every_site_trains_only_the_end_is_scored_apart(bench: Bench) -> None:
    grid = federation()
    _, log = bench.run(grid, rounds=2)
    assert [round_ for round_, _ in log.evaluations] == [2]
    assert len(grid.asked("evaluate")) == 4


def test_a_site_that_fails_to_score_is_told_apart(bench: Bench) -> None:
    def failing(question: Message) -> Iterable[Answer]:
        if question.metadata.message_type == "evaluate":
            return [Answer(error=Error(2, "no rows"))]
        return honest("eve")(question)

    _, log = bench.run(federation("ann", "bob", "zoe", eve=failing))
    by_site = {s.site: s for s in log.evaluations[0][1]}
    assert (by_site["eve"].status, by_site["eve"].reason) == ("failed", "no rows")
    assert by_site["ann"].report["before-loss-sum"] == 2.5


def test_what_a_site_is_sent_is_enough_to_answer(bench: Bench) -> None:
    grid = federation()
    bench.run(grid, rounds=1)
    question = grid.questions[0]
    assert question.metadata.message_type == "train"
    assert question.metadata.dst_node_id == NODES["ann"]  # by name, not by node id
    plan = dict(question.content.config_records["plan"])
    assert plan == {"round": 1, "for": "ann", "layout": LAYOUT.digest}
    assert to_bytes(decode_all(question.content.array_records["arrays"])) == to_bytes(START)
    assert str(bench.folder) not in str(question.content)


def test_a_full_disk_under_the_spool_ends_the_round_and_keeps_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, log = cohort.Spool.put, Log()

    def full_later(self: cohort.Spool, site: str, delta_D: Tensor) -> None:
        if log.rounds:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, site, delta_D)

    monkeypatch.setattr(cohort.Spool, "put", full_later)
    with pytest.raises(
        RoundError, match=r"No space left.*Finished rounds are safe.*free some space"
    ):
        bench.strategy(log).start(federation(), to_record(START), num_rounds=3, timeout=20)
    assert [r.round for r in log.rounds] == [1]
    assert not list((bench.folder / "spool").iterdir())


def test_the_spool_is_empty_after_each_round(bench: Bench) -> None:
    left = bench.folder / "spool"
    left.mkdir()
    (left / "000000.f32").write_bytes(b"of a run that was killed")
    got, _ = bench.run(federation())
    assert got == bench.run(federation())[0]
    assert not list(left.iterdir())


def test_a_listener_that_cannot_keep_a_round_stops_the_run(bench: Bench) -> None:
    class Full(Log):
        def round_finished(self, outcome: RoundOutcome) -> None:
            if outcome.round == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().round_finished(outcome)

    log, grid = Full(), federation()
    with pytest.raises(OSError, match="No space"):
        bench.strategy(log).start(grid, to_record(START), num_rounds=5, timeout=20)
    assert len(log.rounds) == 1 and len(grid.asked("train")) == 2 * len(NODES)


def test_records_survive_the_way_through_messages() -> None:
    tensors = {"x": torch.randn(3, 2), "h": torch.randn(4).bfloat16(), "s": torch.tensor(2.0)}
    record = to_record(tensors)
    assert isinstance(record, ArrayRecord) and list(record) == list(tensors)
    back = decode_all(record)
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in back)


def test_size_of_a_message_counts_everything_in_it() -> None:
    content = Answer(report={"a": "x" * 10, "b": ""}, more={"m": ConfigRecord({"k": b"y" * 5})})
    arrays = {"w": Array("float32", (2,), "florilegium.raw", bytes(8))}
    grid = FakeGrid({1: lambda q: [replace(content, arrays=arrays)]})
    question = Message(RecordDict(), 1, "query")
    (reply,) = messages.collect(grid, [question], 1.0)
    assert 8 + 10 + 5 <= messages._nbytes(reply.content) <= 8 + 10 + 5 + 20


@pytest.mark.parametrize("rule", ["centered-clipping", "foolsgold"])
def test_a_restored_run_knows_the_rounds_before(bench: Bench, rule: str) -> None:
    whole, log = bench.run(federation(), rounds=3, rule=rule)
    kept, resumed = log.rounds[0], Log()
    strategy = bench.strategy(resumed, rule=rule)
    strategy.restore(1, {name: tensor.clone() for name, tensor in kept.state.items()})
    result = strategy.start(federation(), to_record(kept.payload), num_rounds=3, timeout=20)
    assert to_bytes(decode_all(result.arrays)) == whole
    forgetful = bench.strategy(Log(), rule=rule)
    forgetful.restore(1, registry.build(StrategyConfig(rule=rule)).init(LAYOUT.size))
    other = forgetful.start(federation(), to_record(kept.payload), num_rounds=3, timeout=20)
    assert to_bytes(decode_all(other.arrays)) != whole


def test_a_screened_site_is_named_with_the_module_and_does_not_count(bench: Bench) -> None:
    bad = sorted(NODES)[0]
    name = LAYOUT.names[0]
    loud = spoiling(bad, with_tensor(name, torch.full(LAYOUT.shapes[0], 100.0)))
    options = {"pre": "module-screen", "num_byzantine": 1, "weighting": "uniform"}
    got, log = bench.run(federation(**{bad: loud}), rounds=1, **options)
    assert log.of(bad).status == "screened"
    assert re.search(rf"module-screen: its update of {name} is [\d.]+ dev", log.of(bad).reason)
    assert {s.status for s in log.rounds[0].sites if s.site != bad} == {"ok"}
    others = [site for site in NODES if site != bad]
    assert got == bench.run(federation(*others), rounds=1, weighting="uniform")[0]


def drawing(*rounds: Sequence[str]) -> Selection:
    """A selection by plan, of which no answer is needed."""
    return Selection(lambda present, round_: tuple(rounds[round_ - 1]), lambda asked: 0)


def test_a_round_that_asks_nobody_goes_on(bench: Bench) -> None:
    got, log = bench.run(federation(), selection=drawing((), ("ann", "zoe")))
    assert [[s.site for s in r.sites] for r in log.rounds] == [[], ["ann", "zoe"]]
    assert log.rounds[0].update_norm == 0.0
    assert got == to_bytes(log.rounds[1].payload) != to_bytes(START)


def test_a_round_that_nobody_answers_goes_on_where_none_is_needed(bench: Bench) -> None:
    grid = federation("ann", bob=silent)
    got, log = bench.run(grid, rounds=1, timeout=0.05, selection=drawing(("bob",)))
    assert log.of("bob").status == "missing"
    assert got == to_bytes(START)
