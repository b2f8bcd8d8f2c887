"""Client-level privacy: sensitivity, noise, accounting, and the limits in which it is the mean."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from models.layout import Layout
from models.section import ConfigError
from privacy import accounting, noise
from privacy.adaptive import Adaptive
from privacy.client_level import Terms, noised_at_site, private
from privacy.correlated import Correlated
from privacy.events import Event
from strategies import registry
from strategies.cohort import Cohort, norm
from strategies.config import StrategyConfig
from strategies.coordinates import median
from strategies.lora import lora_alternate, lora_exact
from strategies.rules import clip, mean, norm_bounding
from strategies.server_optimizers import momentum
from strategies.stage import ComposeError, Rule, State, chain

LAYOUT = Layout(("w",), ((6,),))
WIDE = Layout(("w",), ((20_000,),))
TERMS = Terms(1.0, 1.0, sites=4)


def seeded(generator: torch.Generator) -> noise.Source:
    return noise.seeded(int(torch.randint(2**62, (1,), generator=generator)))


def built(terms: Terms, rule: Rule | None = None) -> tuple[Rule, list[Event]]:
    charged: list[Event] = []
    return private(rule or mean(), terms, seeded, charged.append), charged


def cohort(rows: dict[str, Tensor], layout: Layout = LAYOUT) -> Cohort:
    base_D = torch.zeros(layout.size)
    return Cohort.of(layout, base_D, rows) if rows else Cohort.nobody(layout, base_D)


def drawn(seed: int, count: int, scale: float = 10.0, size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, generator=generator) * scale
    return {f"site-{i}": row for i, row in enumerate(rows)}


def rounds(rule: Rule, cohorts: Sequence[Cohort], seed: int = 0) -> tuple[list[Tensor], State]:
    state = rule.init(cohorts[0].layout.size)
    released = []
    for index, each in enumerate(cohorts):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        delta, state = rule.apply(state, each, generator)
        released.append(delta.vector_D)
    return released, state


def std_of(rule: Rule) -> float:
    """Spread of a round's noise."""
    (released,), _ = rounds(rule, [cohort({}, WIDE)])
    return float(released.std())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7))
def test_without_noise_and_clipping_it_is_the_uniform_mean(seed: int, count: int) -> None:
    rows = drawn(seed, count)
    rule, charged = built(Terms(0.0, math.inf, sites=count))
    (released,), _ = rounds(rule, [cohort(rows)])
    plain, _ = mean().apply({}, cohort(rows), torch.Generator())
    assert torch.allclose(released, plain.vector_D, rtol=1e-5, atol=1e-5)
    assert [event.mechanism for event in charged] == ["none"]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(0, 8),
    st.floats(0.01, 50),
    st.floats(0.1, 1),
)
def test_one_client_moves_the_aggregate_by_at_most_what_the_noise_covers(
    seed: int, count: int, chosen: int, bound: float, share: float
) -> None:
    rows = drawn(seed, count)
    left = {name: row for name, row in rows.items() if name != f"site-{chosen % count}"}
    terms = Terms(0.0, bound, sites=count, share=share)
    rule, _ = built(terms)
    (whole,), _ = rounds(rule, [cohort(rows)])
    (less,), _ = rounds(rule, [cohort(left)])
    moved = norm(whole.double() - less.double())
    assert moved <= bound / (share * count) * (1 + 1e-4)
    noisy, _ = built(replace(terms, noise_multiplier=1.0))
    assert moved <= std_of(noisy) * 1.1  # the multiplier is 1: noise as large as the bound


@pytest.mark.parametrize("optimizer", ["none", "momentum"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_noise_through_the_whole_chain_has_its_scale_and_no_other(
    optimizer: str, share: float
) -> None:
    charged: list[Event] = []
    terms = Terms(2.5, 0.3, sites=8, share=share)
    rule = registry.compose(
        "mean", (), optimizer, around=lambda inner: private(inner, terms, seeded, charged.append)
    )
    rows = drawn(3, 3, scale=1.0, size=20_000)
    (released,), _ = rounds(rule, [cohort(rows, WIDE)])
    exact, _ = chain(clip(clip_norm=0.3), mean()).apply({}, cohort(rows, WIDE), torch.Generator())
    left = released.double() - exact.vector_D.double() * 3 / (share * 8)
    std = 2.5 * 0.3 / (share * 8)
    assert stats.kstest(left.numpy() / std, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(left.numpy() / (std * wrong), "norm").pvalue < 1e-9
    assert charged == [Event("gaussian", "client", 2.5, share, noise_at="server", round=1)]


@pytest.mark.parametrize("rule", [median(), lora_exact(), registry.compose("mean", ["nnm"])])
def test_a_rule_without_a_proof_is_refused_with_the_remedy(rule: Rule) -> None:
    with pytest.raises(
        ComposeError, match=r"proved .*got '.*'; set strategy.rule to 'mean'.*place"
    ):
        built(TERMS, rule)


def test_all_rules_with_a_proof_are_named_and_accepted() -> None:
    with pytest.raises(ComposeError) as refused:
        built(TERMS, median())
    proved = set()
    for name in registry.RULES:
        options = {option: StrategyConfig.model_fields[option].default
                   for option in registry.options_of(name)}  # fmt: skip
        try:
            built(TERMS, registry.compose(name, options=options))
        except ComposeError:
            continue
        proved.add(name)
    remedy = str(refused.value).partition("strategy.rule to")[2].partition("strategy.pre")[0]
    assert proved == set(re.findall(r"'([^']+)'", remedy))


def test_a_tighter_clip_in_the_chain_lowers_the_noise() -> None:
    loose, _ = built(TERMS)
    tight, _ = built(TERMS, norm_bounding(clip_norm=0.1))
    assert std_of(tight) == pytest.approx(0.1 * std_of(loose), rel=0.01)


@pytest.mark.parametrize("empty", [False, True], ids=["a zero update", "nobody"])
def test_rounds_with_nothing_in_them_get_noise_and_are_charged(empty: bool) -> None:
    rows = {} if empty else {"only": torch.zeros(6)}
    rule, charged = built(Terms(1.0, 1.0, sites=1, share=0.5))
    released, state = rounds(rule, [cohort(rows)] * 3)
    assert all(norm(value) > 0 for value in released)
    assert [event.round for event in charged] == [1, 2, 3]
    assert {event.sample_rate for event in charged} == {0.5}
    assert int(state["round"]) == 3


def test_noise_does_not_depend_on_who_answered() -> None:
    rule, _ = built(TERMS)
    (nobody,), _ = rounds(rule, [cohort({})])
    (zeros,), _ = rounds(rule, [cohort({"a": torch.zeros(6), "b": torch.zeros(6)})])
    assert torch.equal(nobody, zeros)


def test_nothing_is_drawn_when_the_charge_fails() -> None:
    def full(event: Event) -> None:
        raise OSError("disk full")

    def forbidden(generator: torch.Generator) -> noise.Source:
        raise AssertionError("noise was drawn before it was charged")

    rule = private(mean(), TERMS, forbidden, full)
    with pytest.raises(OSError, match="disk full"):
        rounds(rule, [cohort(drawn(0, 2))])


def test_the_run_spends_what_the_accountant_says() -> None:
    terms = Terms(1.3, 1.0, sites=10, share=0.4)
    rule, charged = built(terms)
    rounds(rule, [cohort({})] * 12)
    assert accounting.spent(charged, 1e-5) == pytest.approx(
        accounting.epsilon(1.3, 0.4, 12, 1e-5), rel=1e-9
    )


def test_a_run_goes_on_from_its_state_to_the_same_bytes() -> None:
    for terms in (
        Terms(1.0, 1.0, sites=4, adaptive=Adaptive(0.5, 0.2)),
        Terms(1.0, 1.0, sites=4, share=0.5, correlated=Correlated(6, 2, 3)),
    ):
        rule = chain(built(terms, lora_alternate())[0], momentum())
        layout = Layout(("q.lora_A.weight", "q.lora_B.weight"), ((1, 6), (6, 1)))
        cohorts = [cohort(drawn(i, 3, size=12), layout) for i in range(5)]
        whole, last = rounds(rule, cohorts)
        again = chain(built(terms, lora_alternate())[0], momentum())
        state = again.init(12)
        for index in range(2):
            generator = torch.Generator().manual_seed(index)
            _, state = again.apply(state, cohorts[index], generator)
        # A server that comes back to other sites keeps the number that the run began with.
        resumed = chain(built(replace(terms, sites=9), lora_alternate())[0], momentum())
        for index in range(2, 5):
            generator = torch.Generator().manual_seed(index)
            delta, state = resumed.apply(state, cohorts[index], generator)
        assert torch.equal(delta.vector_D, whole[-1])
        assert all(torch.equal(state[key], last[key]) for key in last)


def test_a_round_of_nobody_turns_the_alternation_too() -> None:
    layout = Layout(("q.lora_A.weight", "q.lora_B.weight"), ((1, 3), (3, 1)))
    rule, _ = built(Terms(0.0, math.inf, sites=1), lora_alternate())
    ones = cohort({"only": torch.ones(6)}, layout)
    released, _ = rounds(rule, [cohort({}, layout), ones])
    assert released[1].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


FACTORS = Layout(("q.lora_A.weight", "q.lora_B.weight"), ((4, 5_000), (5_000, 4)))


@pytest.mark.parametrize("turns", [None, Correlated(6, 2, 3)])
def test_a_factor_that_is_held_still_gets_no_noise(turns: Correlated | None) -> None:
    """What does not move tells nothing, and noise on it would move it all the same."""
    terms = Terms(1.5, 0.7, sites=4, share=0.5, correlated=turns)
    around = registry.compose(
        "lora-alternate", ["clip"], options={"clip_norm": 0.7},
        around=lambda rule: built(terms, rule)[0],
    )  # fmt: skip
    rows = drawn(5, 3, size=FACTORS.size)
    released, state = rounds(around, [cohort(rows, FACTORS)] * 6)
    for at, vector_D in enumerate(released, 1):
        parts = FACTORS.unflatten(vector_D)
        moved, still = ("q.lora_B.weight", "q.lora_A.weight")[:: 1 if at % 2 else -1]
        assert not parts[still].any()
        assert int((parts[moved] == 0).sum()) < 10
    if turns:
        (kept,) = [tensor for key, tensor in state.items() if key.endswith("/noise")]
        assert not FACTORS.unflatten(kept[0].float())["q.lora_B.weight"].any()


def test_what_is_released_beside_held_factors_are_rows_of_the_noised_matrix() -> None:
    """So that a site's guarantee is the one of all the rows, whose noise is independent."""
    turns = Correlated(6, 2, 3)
    rule, _ = built(Terms(1.5, 0.7, sites=4, share=0.5, correlated=turns), lora_alternate())
    released, _ = rounds(rule, [cohort({}, FACTORS)] * 6)
    matrix = np.zeros((6, 6))
    for offset, value in enumerate(turns.coefficients):
        matrix += np.diag(np.full(6 - offset, value), -offset)
    white = matrix @ torch.stack(released).double().numpy()
    factors = white[:, :20_000], white[:, 20_000:]
    std = 1.5 * 0.7 / 2 * turns.gain
    for at in range(6):
        row = factors[(at + 1) % 2][at]  # B in odd rounds, A in even ones
        assert stats.kstest(row / std, "norm").pvalue > 1e-3
        assert stats.kstest(row / std * 1.5, "norm").pvalue < 1e-9
    for factor, first in (factors[1], 0), (factors[0], 1):
        assert np.abs(np.corrcoef(factor[first::2]) - np.eye(3)).max() < 0.05


def test_a_rule_that_moves_what_it_says_it_holds_is_refused() -> None:
    wrong = replace(mean(), holds=lambda state, layout: frozenset(layout.names))
    with pytest.raises(ComposeError, match=r"Expected no change of w, which the rule says"):
        rounds(built(TERMS, wrong)[0], [cohort(drawn(0, 2))])


def test_the_adaptive_norm_clips_the_next_round() -> None:
    terms = Terms(0.0, 8.0, sites=2, adaptive=Adaptive(0.5, 1.0))
    rule, _ = built(terms)
    rows = {"a": torch.eye(6)[0], "b": torch.eye(6)[1]}
    _, state = rounds(rule, [cohort(rows)] * 2)
    assert float(state["clip"]) == pytest.approx(8.0 * math.exp(-0.5) ** 2)
    released, state = rounds(rule, [cohort(rows)] * 40)
    assert 0.3 < norm(released[-1]) / norm(released[0]) <= 1.0
    assert 0.5 < float(state["clip"]) < 2.0


def test_correlated_noise_is_what_the_matrix_makes_of_independent_noise() -> None:
    turns = Correlated(6, 2, 3)
    terms = Terms(1.5, 0.7, sites=4, share=0.5, correlated=turns)
    rule, charged = built(terms)
    released, state = rounds(rule, [cohort({}, WIDE)] * 6)
    noisy = torch.stack(released).double().numpy()
    matrix = np.zeros((6, 6))
    for offset, value in enumerate(turns.coefficients):
        matrix += np.diag(np.full(6 - offset, value), -offset)
    white = matrix @ noisy  # independent again, of one scale
    std = 1.5 * 0.7 / 2 * turns.gain
    for row in white:
        assert stats.kstest(row / std, "norm").pvalue > 1e-3
        assert stats.kstest(row / std * 1.5, "norm").pvalue < 1e-9
    assert np.abs(np.corrcoef(white) - np.eye(6)).max() < 0.05
    assert np.corrcoef(noisy)[0, 1] < -0.2  # a later round takes back noise of the one before
    assert [event.round for event in charged] == [1, 3, 5]
    assert {event.sample_rate for event in charged} == {1.0}
    assert state["noise"].shape == (2, WIDE.size)


def test_correlated_noise_leaves_the_aggregate_where_it_is() -> None:
    terms = Terms(1e-6, 1.0, sites=3, correlated=Correlated(4, 1, 3))
    rule, _ = built(terms)
    rows = drawn(5, 3, scale=0.1)
    released, _ = rounds(rule, [cohort(rows)] * 4)
    exact = torch.stack(list(rows.values())).mean(0)
    assert all(torch.allclose(value, exact, atol=1e-4) for value in released)


def test_terms_that_changed_within_a_run_are_refused() -> None:
    rule, _ = built(TERMS)
    _, state = rounds(rule, [cohort({})])
    other, _ = built(replace(TERMS, noise_multiplier=2.0))
    with pytest.raises(ConfigError, match=r"noise of the run to resume .*: 1, 1, 1.*got 2, 1, 1"):
        other.apply(state, cohort({}), torch.Generator())
    with pytest.raises(ConfigError, match=r"at most 8 sites in a round .*began with 4, got 9"):
        rounds(rule, [cohort(drawn(0, 9))])
    with pytest.raises(ConfigError, match=r"clipping='fixed' with privacy.noise='correlated'"):
        replace(TERMS, adaptive=Adaptive(0.5, 0.2), correlated=Correlated(3, 1, 1))


def test_a_site_clips_and_noises_its_own_update() -> None:
    names = {"b": torch.randn(100, 100), "a": torch.randn(10_000)}
    sent = noised_at_site(names, 0.5, 2.0, noise.seeded(1))
    assert list(sent) == ["b", "a"] and sent["b"].shape == (100, 100)
    whole = torch.cat([names["b"].flatten(), names["a"]]).double()
    left = torch.cat([sent["b"].flatten(), sent["a"]]).double() - whole * 0.5 / norm(whole)
    assert stats.kstest(left.numpy(), "norm", args=(0, 1.0)).pvalue > 1e-3
    assert stats.kstest(left.numpy(), "norm", args=(0, 1.5)).pvalue < 1e-9
    small = {"a": torch.tensor([0.1, 0.2])}
    assert torch.equal(noised_at_site(small, 0.5, 0.0, noise.secure())["a"], small["a"])
    zero = noised_at_site({"a": torch.zeros(3)}, 0.5, 1.0, noise.secure())
    assert norm(zero["a"]) > 0
