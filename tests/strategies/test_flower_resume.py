"""The strategy taken up where it was left ends with the same bytes."""

from __future__ import annotations

import pytest
import torch

from strategies import registry
from strategies.config import StrategyConfig
from strategies.messages import decode_all, to_record
from tests.strategies.federation import (
    LAYOUT,
    Bench,
    Log,
    federation,
    to_bytes,
)


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
