"""Stages of aggregation and their composition.

A stage before the rule maps Cohort -> Cohort, a rule Cohort -> Delta, a stage after it Delta ->
Delta. Stages are pure: state goes in and comes out as named tensors, randomness is an explicit
generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from models.layout import Layout
from models.section import ConfigError
from strategies.cohort import Cohort, Delta

State: TypeAlias = dict[str, Tensor]
In = TypeVar("In", Cohort, Delta)
Out = TypeVar("Out", Cohort, Delta)


class ComposeError(ConfigError):
    """Stages that do not fit together."""


@dataclass(frozen=True)
class Facts:
    """What is proved of the value between two stages, for every possible input; None: nothing.

    `clip` bounds each site's delta (L2), `sites` their number. `max_weight` bounds each site's
    weight, and may be given only where weights are fixed: depend neither on the sites' data nor on
    who takes part. `sensitivity` bounds how far (L2) the aggregate moves when one site's delta
    is replaced by zero, or left out, the others and their weights staying as they are (the
    zero-out relation, unit: client). It holds for the numbers as computed, roundings included.
    """

    clip: float | None = None
    max_weight: float | None = None
    sites: int | None = None
    sensitivity: float | None = None


def no_state(size: int) -> State:
    """Initial state of a stage that remembers nothing between rounds."""
    return {}


def no_proof(facts: Facts) -> Facts:
    """Facts after a stage about which nothing has been proved: none."""
    return Facts()


def nothing_held(state: State, layout: Layout) -> frozenset[str]:
    """Tensors that a stage never moves, of one that may move all: none."""
    return frozenset()


def any_number(count: int) -> int:
    """Rows that a stage gives for `count` rows, of a stage that takes any number and keeps it."""
    return count


@dataclass(frozen=True)
class Stage(Generic[In, Out]):
    """One step of aggregation, from a value of type `takes` to one of type `gives`.

    `init(D)` gives the first state; `apply(state, value, generator)` returns the new value and the
    new state and changes neither argument; `proves` turns facts about every input into facts
    about every output, and proves nothing unless a stage says otherwise. `requires(N)` is the
    number of rows that the stage makes of N, and raises CohortError where N are too few for it.
    `holds(state, layout)` names the tensors whose change `apply` gives as exactly zero in that
    state, whatever the updates are: it goes by what the state says of rounds, never of updates.
    """

    name: str
    takes: type[In]
    gives: type[Out]
    apply: Callable[[State, In, torch.Generator], tuple[Out, State]]
    init: Callable[[int], State] = no_state
    proves: Callable[[Facts], Facts] = no_proof
    requires: Callable[[int], int] = any_number
    holds: Callable[[State, Layout], frozenset[str]] = nothing_held

    def sensitivity(self, facts: Facts) -> float | None:
        """Proved L2 sensitivity of the output (see `Facts`), or None where there is no proof."""
        return self.proves(facts).sensitivity


Pre: TypeAlias = Stage[Cohort, Cohort]
Rule: TypeAlias = Stage[Cohort, Delta]
Post: TypeAlias = Stage[Delta, Delta]


def pure(
    function: Callable[[In], Out],
) -> Callable[[State, In, torch.Generator], tuple[Out, State]]:
    """The `apply` of a stage without state and randomness, from a plain function."""
    return lambda state, value, generator: (function(value), state)


def chain(*stages: Pre | Rule | Post) -> Rule:
    """Compose stages into one: any number before the rule, one rule, any number after it.

    The result is a rule itself. Its state is that of its stages, each key prefixed with
    `<stage name>/`. Raises ComposeError when kinds do not fit or two stages share a name.
    """
    _check(stages)

    def init(size: int) -> State:
        return {
            f"{stage.name}/{key}": tensor
            for stage in stages
            for key, tensor in stage.init(size).items()
        }

    def apply(state: State, value: Cohort, generator: torch.Generator) -> tuple[Delta, State]:
        parts = _split(state, [stage.name for stage in stages])
        flow: Cohort | Delta = value
        after: State = {}
        left_out = dict(value.left_out)
        for stage in stages:
            # _check proved that each stage takes what the one before it gives.
            flow, own = stage.apply(parts[stage.name], flow, generator)  # type: ignore[arg-type]
            after |= {f"{stage.name}/{key}": tensor for key, tensor in own.items()}
            left_out |= flow.left_out
        assert isinstance(flow, Delta)
        return replace(flow, left_out=left_out), after

    def proves(facts: Facts) -> Facts:
        for stage in stages:
            facts = stage.proves(facts)
        return facts

    def requires(count: int) -> int:
        for stage in stages:
            count = stage.requires(count)
        return count

    def holds(state: State, layout: Layout) -> frozenset[str]:
        last = stages[-1]
        return last.holds(_split(state, [stage.name for stage in stages])[last.name], layout)

    name = "+".join(stage.name for stage in stages)
    return Stage(name, Cohort, Delta, apply, init, proves, requires, holds)


def _check(stages: tuple[Pre | Rule | Post, ...]) -> None:
    flow: type[Cohort | Delta] = Cohort
    for stage in stages:
        if stage.takes is not flow:
            remedy = (
                "a chain has one rule, and stages that take a Cohort stand before it"
                if flow is Delta
                else "put the rule before it"
            )
            raise ComposeError(
                f"Expected a stage that takes a {flow.__name__}, got {stage.name!r}, which takes "
                f"a {stage.takes.__name__}; {remedy}."
            )
        flow = stage.gives
    if flow is not Delta:
        raise ComposeError("Expected a chain with a rule, got none; add one, such as 'mean'.")
    names = [stage.name for stage in stages]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ComposeError(f"Expected each stage once, got {twice!r} twice; leave one out.")


def _split(state: State, names: list[str]) -> dict[str, State]:
    parts: dict[str, State] = {name: {} for name in names}
    for key, tensor in state.items():
        stage, _, own = key.partition("/")
        if stage not in parts:
            raise ComposeError(
                f"Expected state of the stages {', '.join(names)}, got {key!r}; a checkpoint "
                "resumes only with the strategy it was written with."
            )
        parts[stage][own] = tensor
    return parts
