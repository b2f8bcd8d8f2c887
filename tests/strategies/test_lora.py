"""Rules for LoRA against a dense oracle in float64: what the sites' products add up to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from models.section import ConfigError
from strategies import aggregate, fold
from strategies.cohort import Cohort, CohortError
from strategies.gap import product_gap
from strategies.registry import RULES, compose
from strategies.rules import clip
from strategies.server_optimizers import momentum
from strategies.stage import State, chain

SHAPES = {
    "x.q.lora_A.weight": (2, 9),
    "x.q.lora_B.weight": (11, 2),
    "x.up.lora_A.weight": (3, 24),
    "x.up.lora_B.weight": (60, 3),
    "head.weight": (4, 3),
}
MODULES = ("x.q", "x.up")
Named = dict[str, Tensor]


def drawn(seed: int, scale: float = 1.0) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(s, generator=generator) for name, s in SHAPES.items()}


def product(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """B A of a module, in float64."""
    b, a = (tensors[f"{module}.lora_{part}.weight"].double() for part in "BA")
    return b @ a


def whole(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """B A and the fold of a module together, in float64."""
    total = product(tensors, module)
    if f"{module}.lora_fold.weight" in tensors:
        return total + tensors[f"{module}.lora_fold.weight"].double()
    if f"{module}.lora_fold_A.weight" in tensors:
        left, right = (tensors[f"{module}.lora_fold_{part}.weight"].double() for part in "BA")
        return total + left @ right
    return total


def mean_of_products(
    base: Mapping[str, Tensor], deltas: Sequence[Named], weights: Sequence[float], module: str
) -> Tensor:
    sites = [
        {name: base[name].double() + delta[name].double() for name in SHAPES} for delta in deltas
    ]
    parts = [w * product(site, module) for site, w in zip(sites, weights, strict=True)]
    return torch.stack(parts).sum(0) / sum(weights)


def close(found: Tensor, wanted: Tensor, ulps: float = 16.0) -> bool:
    """Equal but for roundings of float32, relative to the largest entry."""
    bound = ulps * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    return bool((found - wanted).abs().max() <= bound)


@settings(max_examples=25, deadline=None)
@given(
    rule=st.sampled_from(["lora-exact", "lora-stack"]),
    sites=st.integers(1, 9),  # 9 sites times 3 ranks are more than a module has
    scale=st.sampled_from([1e-4, 1.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_product_and_fold_are_the_mean_of_products(
    rule: str, sites: int, scale: float, seed: int
) -> None:
    base = drawn(seed)
    deltas = [drawn(seed + 1 + site, scale) for site in range(sites)]
    weights = [float(1 + (seed + 7 * site) % 5) for site in range(sites)]
    new = aggregate(rule, base, deltas, weights)
    for module in MODULES:
        assert close(whole(new, module), mean_of_products(base, deltas, weights, module))
    plain = aggregate("mean", base, deltas, weights)
    assert torch.equal(new["head.weight"], plain["head.weight"])


@pytest.mark.parametrize("rule", ["lora-exact", "lora-stack"])
def test_over_rounds_the_fold_adds_up_and_ends_as_a_matrix(rule: str) -> None:
    state = drawn(0)
    folded = {module: torch.zeros(SHAPES[f"{module}.lora_B.weight"][0],
                                  SHAPES[f"{module}.lora_A.weight"][1], dtype=torch.float64)
              for module in MODULES}  # fmt: skip
    kinds = []
    for round_ in range(4):
        payload, _ = fold.split(state)
        deltas = [drawn(10 * round_ + site, 0.3) for site in range(3)]
        new = aggregate(rule, state, deltas, [5, 1, 2], seed=round_)
        for module in MODULES:
            # What the frozen weight holds by now, and what this round's products come to.
            wanted = folded[module] + mean_of_products(payload, deltas, [5, 1, 2], module)
            assert close(whole(new, module), wanted, ulps=40)
            folded[module] = wanted - product(new, module)
        kinds.append("x.up.lora_fold.weight" in new)
        state = new
    assert kinds[0] is False and kinds[-1] is True  # from factors to a matrix on the way
    assert set(fold.split(state)[0]) == set(SHAPES)


@pytest.mark.parametrize("rule", ["lora-exact", "lora-stack"])
def test_of_mixed_updates_the_products_are_averaged_not_the_factors(rule: str) -> None:
    base, deltas = drawn(0), {str(site): drawn(site + 1) for site in range(3)}
    layout = Layout.of(base)
    rows = {site: layout.flatten(delta) for site, delta in deltas.items()}
    mix = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.3], [0.2, 0.2, 0.6]])  # row 2 shortens
    cohort = Cohort.of(layout, layout.flatten(base), rows).mixed(mix)
    delta, _ = compose(rule).apply({}, cohort, torch.Generator().manual_seed(0))
    new = delta.added_to(cohort.base_D) | fold.accumulated({}, delta.fold)
    nothing = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    shares = [*mix.mean(0).tolist(), 0.2 / 3]
    for module in MODULES:
        wanted = mean_of_products(base, [*deltas.values(), nothing], shares, module)
        assert close(whole(new, module), wanted)
    # What lengthens, or turns round, is a sum with some of the payload as it was taken away.
    longer = Cohort.of(layout, layout.flatten(base), rows).mixed(torch.eye(3) * -2)
    if rule == "lora-exact":  # whose residual has square roots of the shares
        with pytest.raises(CohortError, match=r"Expected averages .* negative.*'lora-svd'"):
            compose(rule).apply({}, longer, torch.Generator())
        return
    delta, _ = compose(rule).apply({}, longer, torch.Generator().manual_seed(0))
    new = delta.added_to(cohort.base_D) | fold.accumulated({}, delta.fold)
    for module in MODULES:
        wanted = mean_of_products(base, [*deltas.values(), nothing], [-2 / 3] * 3 + [3], module)
        assert close(whole(new, module), wanted, ulps=40)


def test_the_fold_has_no_more_columns_than_it_needs() -> None:
    base = drawn(0) | {"x.up.lora_B.weight": torch.zeros(60, 3)}
    new = aggregate("lora-exact", base, [drawn(1), drawn(2)])
    assert new["x.up.lora_fold_A.weight"].shape == (3, 24)  # (N - 1) R
    alone = aggregate("lora-exact", base, [drawn(1)])
    assert not fold.split(alone)[1]
    # A site of a lower rank pads with zeros, which are not sent on.
    low = drawn(1)
    low["x.up.lora_A.weight"][1:] = -base["x.up.lora_A.weight"][1:]
    low["x.up.lora_B.weight"][:, 1:] = 0
    stacked = aggregate("lora-stack", base, [low, drawn(2)])
    assert stacked["x.up.lora_fold_A.weight"].shape == (1 + 3, 24)


def test_a_fold_that_meets_no_increment_stays() -> None:
    matrix = {"m.lora_fold.weight": torch.ones(2, 2)}
    assert torch.equal(fold.accumulated(matrix, {})["m.lora_fold.weight"], torch.ones(2, 2))
    nothing = {"n": (torch.zeros(40, 1), torch.ones(1, 40))}
    assert list(fold.accumulated(matrix, nothing)) == ["m.lora_fold.weight"]
    assert fold.nbytes(matrix) == 16


def test_lora_mean_has_the_bits_of_mean_and_no_fold() -> None:
    deltas = [drawn(seed) for seed in range(1, 4)]
    plain = aggregate("mean", drawn(0), deltas, [1, 2, 3])
    named = aggregate("lora-mean", drawn(0), deltas, [1, 2, 3])
    assert list(named) == list(plain)
    assert all(torch.equal(named[name], plain[name]) for name in plain)


def test_lora_stack_starts_anew_as_peft_does() -> None:
    base = drawn(0) | {
        "e.lora_embedding_A": torch.ones(2, 40),
        "e.lora_embedding_B": torch.ones(5, 2),
    }
    deltas = [{name: 0.1 * tensor for name, tensor in base.items()}]
    new, again = (aggregate("lora-stack", base, deltas, seed=4) for _ in range(2))
    assert all(torch.equal(new[name], again[name]) for name in new)
    a = torch.cat([new[f"{module}.lora_A.weight"].flatten() * s for module, s in
                   (("x.q", 9**0.5), ("x.up", 24**0.5))])  # fmt: skip
    assert bool((a.abs() <= 1 + 1e-5).all()) and 0.3 < float(a.std()) < 0.8  # uniform: 0.577
    assert not any(new[f"{module}.lora_B.weight"].any() for module in MODULES)
    assert not new["e.lora_embedding_A"].any() and float(new["e.lora_embedding_B"].std()) > 0.3
    other = aggregate("lora-stack", base, deltas, seed=5)
    assert not torch.equal(other["x.q.lora_A.weight"], new["x.q.lora_A.weight"])


def test_lora_freeze_a_leaves_a_and_averages_b() -> None:
    deltas = [drawn(1), drawn(2)]
    new, plain = (aggregate(rule, drawn(0), deltas) for rule in ("lora-freeze-a", "mean"))
    for name in SHAPES:
        wanted = drawn(0) if "lora_A" in name else plain
        assert torch.equal(new[name], wanted[name])
    without = {name: tensor for name, tensor in drawn(0).items() if "lora_A" not in name}
    moved = {name: torch.ones_like(tensor) for name, tensor in without.items()}
    assert torch.equal(
        aggregate("lora-freeze-a", without, [moved])["x.q.lora_B.weight"],
        without["x.q.lora_B.weight"] + 1,
    )


def test_lora_alternate_moves_b_in_odd_rounds_and_a_in_even_ones() -> None:
    stage = compose("lora-alternate")
    layout = Layout.of(drawn(0))
    cohort = Cohort.of(layout, layout.flatten(drawn(0)), {"ann": layout.flatten(drawn(1))})
    state: State = stage.init(layout.size)
    for still in ("lora_A", "lora_B", "lora_A"):
        delta, state = stage.apply(state, cohort, torch.Generator())
        for name, part in layout.unflatten(delta.vector_D).items():
            assert bool(part.any()) is (still not in name)


@pytest.mark.parametrize(
    ("rule", "held"), [("lora-freeze-a", "AAA"), ("lora-alternate", "ABA"), ("lora-share-a", "BBB")]
)
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_what_a_rule_says_that_it_holds_is_zero_whatever_the_updates_are(
    rule: str, held: str, scale: float
) -> None:
    layout = Layout.of(drawn(0))
    chained = chain(clip(clip_norm=1e31), RULES[rule]())
    state = chained.init(layout.size)
    for at, factor in enumerate(held):
        rows = {f"s{i}": layout.flatten(drawn(9 * at + i, scale)) for i in range(1, 4)}
        still = chained.holds(state, layout)
        assert still == {name for name in SHAPES if f".lora_{factor}." in name}
        cohort = Cohort.of(layout, torch.zeros(layout.size), rows)
        delta, state = chained.apply(state, cohort, torch.Generator())
        for name, part in layout.unflatten(delta.vector_D).items():
            assert bool(part.any()) == (name not in still)


def test_a_stage_after_a_rule_holds_nothing_unless_it_says_so() -> None:
    """A momentum of earlier rounds would move what the rule holds."""
    layout = Layout.of(drawn(0))
    chained = chain(RULES["lora-freeze-a"](), momentum())
    assert not chained.holds(chained.init(layout.size), layout)


@settings(max_examples=25, deadline=None)
@given(sites=st.integers(1, 6), seed=st.integers(0, 999))
def test_the_product_gap_is_that_of_dense_products(sites: int, seed: int) -> None:
    base, deltas = drawn(seed), [drawn(seed + 1 + site) for site in range(sites)]
    weights = {str(site): float(1 + (seed + site) % 4) for site in range(sites)}
    layout = Layout.of(base)
    rows = {str(site): layout.flatten(delta) for site, delta in enumerate(deltas)}
    found = product_gap(Cohort.of(layout, layout.flatten(base), rows, weights))
    new = aggregate("mean", base, deltas, list(weights.values()))
    wanted = {m: mean_of_products(base, deltas, list(weights.values()), m) for m in MODULES}
    gap = sum(float((wanted[m] - product(new, m)).square().sum()) for m in MODULES)
    total = sum(float(wanted[m].square().sum()) for m in MODULES)
    assert found == pytest.approx((gap / total) ** 0.5, rel=1e-4, abs=1e-6)


def test_the_product_gap_is_nothing_without_products_and_zero_where_they_agree() -> None:
    layout = Layout(("w",), ((3,),))
    assert product_gap(Cohort.of(layout, torch.zeros(3), {"a": torch.ones(3)})) is None
    layout = Layout.of(drawn(0))
    rows = {name: torch.zeros(layout.size) for name in "ab"}
    assert product_gap(Cohort.of(layout, torch.zeros(layout.size), rows)) == 0.0
    assert product_gap(Cohort.of(layout, layout.flatten(drawn(0)), rows)) == 0.0


@pytest.mark.parametrize("rule", sorted(rule for rule in RULES if rule.startswith("lora-")))
def test_payloads_of_other_kinds_are_refused(rule: str) -> None:
    wanted = f"factors A and B in the payload with strategy.rule='{rule}'.*payload.kind='lora'"
    with pytest.raises(ConfigError, match=wanted):
        aggregate(rule, {"w": torch.zeros(2)}, [{"w": torch.ones(2)}])


@pytest.mark.parametrize("rule", ["lora-exact", "lora-stack"])
def test_what_is_not_a_plain_product_is_refused(rule: str) -> None:
    dora = drawn(0) | {"x.q.lora_magnitude_vector.weight": torch.ones(11)}
    with pytest.raises(ConfigError, match=r"of DoRA.*take 'use_dora' out"):
        aggregate(rule, dora, [dora])
    conv = drawn(0) | {
        "c.lora_A.weight": torch.ones(2, 3, 1, 1),
        "c.lora_B.weight": torch.ones(4, 2, 1, 1),
    }
    with pytest.raises(ConfigError, match=r"linear and embedding.*'c\.lora_A\.weight'"):
        aggregate(rule, conv, [conv])
    assert "c.lora_A.weight" in aggregate("lora-mean", conv, [conv])


@pytest.mark.parametrize("rule", ["lora-exact", "lora-stack", "lora-alternate"])
def test_server_optimizers_that_break_exactness_are_refused(rule: str) -> None:
    wanted = f"server-optimizer='none' with strategy.rule='{rule}', got 'adam'"
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        aggregate(rule, drawn(0), [drawn(1)], server_optimizer="adam")
