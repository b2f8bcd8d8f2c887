"""The strategy over sites: order, quorum, deadline, scores, and what it leaves behind."""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from flwr.app import Error, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.seeds import derive
from strategies import cohort, registry
from strategies.config import StrategyConfig
from strategies.flower import ComposedStrategy, RoundError, RoundOutcome
from strategies.messages import decode_all, to_record
from strategies.sampling import Selection
from tests.fakes import Answer, FakeGrid, silent
from tests.strategies.federation import (
    EXAMPLES,
    LAYOUT,
    NODES,
    START,
    Bench,
    Log,
    federation,
    filled,
    honest,
    spoiling,
    to_bytes,
    with_tensor,
)


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
