"""Composition of stages: kinds, state by name, proofs carried through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.layout import Layout
from strategies.cohort import Cohort, CohortError, Delta
from strategies.conditions import tolerated
from strategies.rules import clip, mean
from strategies.server_optimizers import momentum, none, yogi
from strategies.stage import ComposeError, Facts, Post, Pre, Rule, Stage, State, chain, pure

LAYOUT = Layout(("w",), ((2,),))


def cohort() -> Cohort:
    deltas = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 3.0])}
    return Cohort.of(LAYOUT, torch.zeros(2), deltas)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def scale(name: str, factor: float) -> Post:
    def apply(delta: Delta) -> Delta:
        return replace(delta, vector_D=delta.vector_D * factor)

    return Stage(name, Delta, Delta, pure(apply))


def counter(name: str) -> Post:
    def apply(state: State, delta: Delta, _: torch.Generator) -> tuple[Delta, State]:
        return delta, {"seen": state["seen"] + 1}

    return Stage(name, Delta, Delta, apply, init=lambda size: {"seen": torch.zeros(())})


def jitter() -> Post:
    def apply(state: State, delta: Delta, generator: torch.Generator) -> tuple[Delta, State]:
        noise = torch.randn(delta.vector_D.shape, generator=generator)
        return replace(delta, vector_D=delta.vector_D + noise), state

    return Stage("jitter", Delta, Delta, apply)


def test_stages_run_in_order() -> None:
    rule = chain(clip(clip_norm=1.0), mean(), scale("double", 2.0))
    delta, state = rule.apply({}, cohort(), generator())
    assert delta.vector_D.tolist() == pytest.approx([1.0, 1.0])
    assert state == {} and rule.name == "clip+mean+double"


def test_chain_of_a_rule_alone_is_the_rule() -> None:
    alone, _ = mean().apply({}, cohort(), generator())
    chained, _ = chain(mean()).apply({}, cohort(), generator())
    assert torch.equal(alone.vector_D, chained.vector_D)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "chain with a rule, got none"),
        ([clip(clip_norm=1.0)], "chain with a rule, got none"),
        ([none()], "takes a Cohort, got 'none', which takes a Delta; put the rule before it"),
        ([clip(clip_norm=1.0), none(), mean()], "takes a Cohort, got 'none'"),
        ([mean(), clip(clip_norm=1.0)], "takes a Delta, got 'clip', which takes a Cohort"),
        ([mean(), mean()], "a chain has one rule"),
        ([mean(), none(), none()], "got 'none' twice"),
    ],
)
def test_wrong_compositions_are_errors(stages: list[Pre | Rule | Post], message: str) -> None:
    with pytest.raises(ComposeError, match=message):
        chain(*stages)


def test_state_is_addressed_by_stage_name() -> None:
    rule = chain(mean(), counter("first"), counter("second"), momentum())
    state = rule.init(2)
    assert set(state) == {"first/seen", "second/seen", "momentum/m"}
    state["second/seen"] += 5
    before = {key: tensor.clone() for key, tensor in state.items()}
    _, after = rule.apply(state, cohort(), generator())
    assert (float(after["first/seen"]), float(after["second/seen"])) == (1.0, 6.0)
    assert after["momentum/m"].tolist() == [0.5, 1.5]
    assert all(torch.equal(state[key], before[key]) for key in before), "apply changed its input"


def test_a_chain_is_a_stage_of_another_chain() -> None:
    inner = chain(clip(clip_norm=1.0), mean(), counter("count"))
    outer = chain(inner, momentum(momentum=0.5, learning_rate=1.0))
    flat = chain(
        clip(clip_norm=1.0), mean(), counter("count"), momentum(momentum=0.5, learning_rate=1.0)
    )
    nested_state, flat_state = outer.init(2), flat.init(2)
    for _ in range(3):
        nested, nested_state = outer.apply(nested_state, cohort(), generator())
        plain, flat_state = flat.apply(flat_state, cohort(), generator())
        assert torch.equal(nested.vector_D, plain.vector_D)
    assert set(nested_state) == {"clip+mean+count/count/seen", "momentum/m"}


def test_state_of_another_strategy_is_refused() -> None:
    state = chain(mean(), yogi()).init(2)
    with pytest.raises(ComposeError, match="state of the stages mean, momentum, got 'yogi/m'"):
        chain(mean(), momentum()).apply(state, cohort(), generator())


def test_randomness_comes_from_the_generator_only() -> None:
    rule = chain(mean(), jitter())
    first, _ = rule.apply({}, cohort(), torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    again, _ = rule.apply({}, cohort(), torch.Generator().manual_seed(1))
    other, _ = rule.apply({}, cohort(), torch.Generator().manual_seed(2))
    assert torch.equal(first.vector_D, again.vector_D)
    assert not torch.equal(first.vector_D, other.vector_D)


def test_a_stage_without_a_proof_proves_nothing_and_ends_the_proof_before_it() -> None:
    facts = Facts(clip=1.0, max_weight=0.5, sites=2)
    assert scale("double", 2.0).proves(facts) == Facts()
    assert chain(mean(), none()).sensitivity(facts) == pytest.approx(0.5)
    assert chain(mean(), scale("double", 2.0)).sensitivity(facts) is None
    assert chain(mean(), momentum()).sensitivity(facts) is None


def test_the_number_of_rows_is_checked_along_the_chain() -> None:
    def halve(count: int) -> int:
        tolerated(count, 2, 2, 3)
        return count // 2

    def choose(count: int) -> int:
        tolerated(count, 1, 1, 4)
        return count

    kept = pure(lambda cohort: cohort)
    half = Stage("half", Cohort, Cohort, kept, requires=halve)
    picky = Stage("picky", Cohort, Cohort, kept, requires=choose)
    rule = chain(half, picky, mean())
    assert rule.requires(10) == 5
    with pytest.raises(CohortError, match=r"num-byzantine=1 to be at most 0 \(n=4 needs n ≥ f\+4"):
        rule.requires(9)
    with pytest.raises(CohortError, match=r"=2 to be at most 1 \(n=6 needs n ≥ 2f\+3\); lower it"):
        rule.requires(6)
    with pytest.raises(CohortError, match=r"at least 3 updates .*got n=2 \(n ≥ 2f\+3\); add sites"):
        rule.requires(2)
