"""Chains of stages on LoRA factors: what a liar gains by (k A, B / k), and what is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from models.section import ConfigError
from strategies import aggregate, fold, registry, together
from strategies.cohort import Cohort, CohortError, norm
from strategies.coordinates import median, trimmed_mean
from strategies.geometry import lengths
from strategies.lora import lora_alternate, lora_exact, lora_mean
from strategies.preaggregation import bucketing, nnm
from strategies.product import structure
from strategies.rules import mean
from strategies.screening import module_screen
from strategies.stage import Facts, Rule, chain
from strategies.weighers import multi_krum
from tests.strategies.cohorts import prepared, result
from tests.strategies.lora import LORA, PAIRS, lora_cohort, products, update

SEEDS = st.integers(0, 10_000)
ROOT = lora_cohort(77, 1).rows[0]
SITES = 7


def options(rule: str, *pre: str, **values: object) -> dict[str, object]:
    known = {"clip_norm": 3.0, "num_byzantine": 1} | values
    return {name: known[name] for name in registry.options_of(rule, pre) if name in known}


def made(rule: str, *pre: str, **values: object) -> Rule:
    return registry.compose(rule, pre, options=options(rule, *pre, **values))


def trusting(cohort: Cohort) -> Cohort:
    return replace(cohort, trusted_D=ROOT)


def moved(rule: Rule, cohort: Cohort) -> Tensor:
    """What a rule adds to the products of a layout with pairs, its fold included, dense."""
    generator = torch.Generator().manual_seed(0)
    delta, _ = rule.apply(rule.init(LORA.size), cohort, generator)
    folded = fold.accumulated({}, delta.fold)
    base, new = (LORA.unflatten(v) for v in (cohort.base_D, cohort.base_D + delta.vector_D))
    parts = []
    for (a, b), pair in zip(PAIRS, structure(LORA).pairs, strict=True):
        part = new[b].double() @ new[a].double() - base[b].double() @ base[a].double()
        for name, whole in folded.items():
            if name == f"{pair.module}.lora_fold.weight":
                part = part + whole.double()
            if name == f"{pair.module}.lora_fold_A.weight":
                part = part + folded[name.replace("_A", "_B")].double() @ whole.double()
        parts.append(part.flatten() * cohort.lora_scale)
    head = new["head.weight"].double() - base["head.weight"].double()
    return torch.cat([*parts, head.flatten()])


def test_the_stages_that_judge_are_those_that_say_so() -> None:
    cohort = trusting(lora_cohort(0, SITES))
    for name in registry.PRE:
        stage = registry.PRE[name](**options("mean", name))
        assert prepared(stage, cohort).judged is (name in together.JUDGING), name
        # What is said stays said, whatever stage comes after it.
        assert prepared(stage, replace(cohort, judged=True)).judged
    assert set(together.JUDGING) >= set(registry.WEIGHERS)


@pytest.mark.parametrize("pre", together.JUDGING)
@pytest.mark.parametrize("k", [-1.0, 1000.0])
def test_a_mean_after_a_stage_that_judges_believes_no_scale_of_factors(pre: str, k: float) -> None:
    plain, turned = (
        trusting(lora_cohort(3, SITES, gauge=gauge)) for gauge in ([], [1.0, k, 1.0, k])
    )
    stage = made("mean", pre)
    wanted, got = moved(stage, plain), moved(stage, turned)
    assert float((got - wanted).norm()) <= 2e-3 * float(wanted.norm())
    # A bound is on the products as well, whatever factors they are mixed of; and the result never
    # moves further than twice the bound: the best approximation of a product is as near to it as
    # the product before the round.
    for bound in (1e-2, 3.0, 1e6):
        stage = made("norm-bounding", pre, clip_norm=bound)
        bounded, got = moved(stage, plain), moved(stage, turned)
        assert float((got - bounded).norm()) <= 2e-3 * float(wanted.norm())
        assert float(bounded.norm()) <= 2 * bound * (1 + 1e-4)
        by_hand = [registry.PRE[pre](**options("mean", pre)), registry.rules.clip(clip_norm=bound)]
        torch.testing.assert_close(got, moved(chain(*by_hand, mean()), turned))
    # By coordinates the same attack would have won.
    apart = moved(mean(), turned) - moved(mean(), plain)
    assert float(apart.norm()) > 0.1 * float(wanted.norm())


@given(SEEDS, st.sampled_from(["", "clip", "bucketing"]))
@settings(max_examples=15)
def test_means_of_updates_that_nothing_has_judged_add_factors_up_apart(seed: int, pre: str) -> None:
    cohort = lora_cohort(seed, 5)
    names = [pre] if pre else []
    mixed = prepared(registry.PRE[pre](**options("mean", pre)), cohort) if pre else cohort
    rows = torch.stack(list(mixed.rows)).double()
    wanted = (mixed.weights_N.double()[:, None] * rows).sum(0)
    got = result(made("mean", *names), cohort).double()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "bulyan"])
@pytest.mark.parametrize(
    "pre", [("nnm",), ("nnm", "clip"), ("bucketing", "nnm"), ("multi-krum", "nnm")]
)
def test_coordinates_of_mixes_that_were_judged_as_products_are_refused(
    rule: str, pre: tuple[str, ...]
) -> None:
    cohort = lora_cohort(0, 16)
    base, deltas = LORA.unflatten(cohort.base_D), [LORA.unflatten(row) for row in cohort.rows]
    given_options = options(rule, *pre, num_byzantine=0)
    with pytest.raises(ConfigError, match=r"single sites .*strategy\.rule='geometric-median'"):
        aggregate(rule, base, deltas, pre=pre, **given_options)
    # A chain that was put together by hand finds out when it meets the factors.
    wanted = "nothing has judged for median" if rule == "median" else "single sites .*multi-krum"
    with pytest.raises(CohortError, match=wanted):
        result(made(rule, *pre, num_byzantine=0), cohort)
    without = [{"head.weight": delta["head.weight"]} for delta in deltas]
    aggregate(rule, {"head.weight": base["head.weight"]}, without, pre=pre, **given_options)


def with_liars(honest: int, liars: int, k: float) -> Cohort:
    """Sites near one update, and liars who send (k A, B / k) of it, the most central of all."""
    generator = torch.Generator().manual_seed(5)
    base_D = lora_cohort(0, 1).base_D
    centre_D = torch.randn(LORA.size, generator=generator)
    rows = [centre_D + 0.1 * torch.randn(LORA.size, generator=generator) for _ in range(honest)]
    turned = {
        name: tensor * (k if "_A" in name else 1 / k if "_B" in name else 1)
        for name, tensor in LORA.unflatten(base_D + centre_D).items()
    }
    # Named so that ties go to them.
    forged = {f"a-liar-{index}": LORA.flatten(turned) - base_D for index in range(liars)}
    return Cohort.of(LORA, base_D, {f"site-{i:02d}": row for i, row in enumerate(rows)} | forged)


def out_of_range(cohort: Cohort, found_D: Tensor) -> float:
    """How far a result is beyond the honest values of a coordinate, at worst."""
    rows = zip(cohort.names, cohort.rows, strict=True)
    honest = torch.stack([row_D for name, row_D in rows if name.startswith("site")])
    low, high = honest.min(0).values, honest.max(0).values
    return float(torch.maximum(low - found_D, found_D - high).max())


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "bulyan"])
@pytest.mark.parametrize("pre", together.JUDGING)
@pytest.mark.parametrize(("honest", "liars"), [(6, 1), (6, 3), (19, 2), (4, 1), (14, 6)])
@pytest.mark.parametrize("selected", [0, 2])
def test_a_rule_by_coordinate_after_a_stage_that_judges_is_refused_or_stays_within_the_honest_range(
    rule: str, pre: str, honest: int, liars: int, selected: int
) -> None:
    cohort = trusting(with_liars(honest, liars, 1000.0))
    found = options(rule, pre, num_byzantine=liars, num_selected=selected)
    base, rows = LORA.unflatten(cohort.base_D), zip(cohort.names, cohort.rows, strict=True)
    deltas = {name: LORA.unflatten(row_D) for name, row_D in rows}
    trusted = LORA.unflatten(ROOT)
    try:
        new = aggregate(rule, base, deltas, pre=pre, trusted=trusted, **found)
    except (ConfigError, CohortError):
        # Where many sites are left, rules with a condition on their number go on.
        left = honest + liars - (0 if pre == "module-screen" else liars)
        enough = left >= (4 * liars + 3 if rule == "bulyan" else 2 * liars + 1)
        screened = pre == "module-screen" or (pre == "multi-krum" and not selected)
        krum = pre != "multi-krum" or honest >= liars + 3
        assert rule == "median" or not (enough and screened and krum)
    else:
        assert rule != "median" and out_of_range(cohort, LORA.flatten(new) - cohort.base_D) < 1e-5


def test_why_a_median_of_those_that_were_chosen_is_refused() -> None:
    """Two of two that Krum ranks best are liars, where the median by itself holds."""
    cohort = with_liars(7, 2, 1000.0)
    assert out_of_range(cohort, result(median(), cohort)) < 1e-5
    for before in (multi_krum(num_byzantine=2, num_selected=2), module_screen(num_byzantine=2)):
        with pytest.raises(CohortError, match=r"judged for median, .*geometric-median"):
            result(chain(before, median()), cohort)
    chosen = prepared(multi_krum(num_byzantine=2, num_selected=2), cohort)
    assert all(name.startswith("a-liar") for name in chosen.names)
    believed = result(median(), replace(chosen, judged=False))
    assert out_of_range(cohort, believed) > 100
    with pytest.raises(ConfigError, match=r"before strategy\.rule='median' .*'trimmed-mean'"):
        together.check_factors("median", ("multi-krum",), "none")


@pytest.mark.parametrize("last", [median(), trimmed_mean()])
def test_coordinates_of_plain_buckets_and_of_chosen_sites_are_let_through(last: Rule) -> None:
    cohort = with_liars(7, 1, 1000.0)
    befores = [bucketing(bucket_size=2)]
    befores += [multi_krum(), module_screen()] if last.name != "median" else []
    for before in befores:
        assert out_of_range(cohort, result(chain(before, last), cohort)) < 1e-5


@pytest.mark.parametrize("rule", ["lora-mean", "lora-exact", "lora-alternate"])
@pytest.mark.parametrize("pre", ["multi-krum", "module-screen,multi-krum", "fltrust", "nnm"])
def test_rules_that_add_factors_up_apart_are_refused_after_a_stage_that_judges(
    rule: str, pre: str
) -> None:
    wanted = f"no stage that judges products .*strategy.rule='{rule}', got strategy.pre='{pre}'"
    with pytest.raises(ConfigError, match=wanted + ".*set strategy.rule='lora-svd'"):
        registry.compose(rule, registry.split_names(pre))


@pytest.mark.parametrize("rule", [lora_mean(), lora_exact(), lora_alternate()])
def test_so_are_chains_of_them_that_were_put_together_by_hand(rule: Rule) -> None:
    with pytest.raises(CohortError, match=r"B A nothing has judged for lora-"):
        result(chain(nnm(), rule), lora_cohort(0, 5))


CLOSING = ("lora-svd", "lora-stack", "krum", "geometric-median", "centered-clipping")


@pytest.mark.parametrize("rule", ["lora-exact", *CLOSING])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_clip_bounds_what_the_product_of_factors_moves(rule: str, scale: float) -> None:
    # Factors as long as the gate lets through, in one direction, so that the product is huge.
    base_D = 0.1 * lora_cohort(0, 1).base_D
    bad = {name: torch.zeros(shape) for name, shape in zip(LORA.names, LORA.shapes, strict=True)}
    for a, b in PAIRS:
        bad[a][0], bad[b][:, 0] = 2000.0, 2000.0
    deltas = {name: LORA.flatten(bad) for name in "abcde"}
    cohort = replace(Cohort.of(LORA, base_D, deltas), lora_scale=scale)
    assert float(moved(made("lora-svd"), cohort).norm()) > 1e6
    values = {"clip_radius": 1e9, "num_byzantine": 1}
    got = float(moved(made(rule, "clip", clip_norm=1.5, **values), cohort).norm())
    # The best approximation of the payload's rank is no further away than what it approximates.
    assert 0 < got <= (1.5 if rule in ("lora-exact", "lora-stack") else 3.0) * (1 + 1e-4)


@given(SEEDS, st.sampled_from([1e-3, 1.0, 3.0]), st.floats(0.1, 30.0))
@settings(max_examples=25)
def test_clipped_factors_are_within_the_bound_and_so_are_their_products(
    seed: int, share: float, bound: float
) -> None:
    cohort = lora_cohort(seed, 4, lora_scale=2.0).mixed(share * torch.eye(4))
    scaled = prepared(registry.rules.clip_products(clip_norm=bound), cohort)
    assert scaled.clip == bound
    assert all(norm(row) <= bound for row in scaled.rows)
    dense = scaled.matrix_NS @ products(lora_cohort(seed, 4, lora_scale=2.0))
    assert float(dense.norm(dim=1).max()) <= bound * (1 + 1e-6)
    # Nothing is shortened that is within both.
    free = (
        torch.stack([dense.norm(dim=1), torch.tensor([norm(r) for r in scaled.rows])])
        < 0.999 * bound
    ).all(0)
    assert torch.equal(scaled.matrix_NS[free], cohort.matrix_NS[free])


@pytest.mark.parametrize("pre", together.JUDGING)
def test_a_bound_after_a_stage_that_judges_is_on_products_alone(pre: str) -> None:
    """One liar with (k A, B / k) of an honest product is in most mixes of `nnm`."""
    plain, turned = (trusting(with_liars(9, 1, k)) for k in (1.0, 1000.0))
    judged, bounded = [], []
    for cohort in (plain, turned):
        judged.append(prepared(registry.PRE[pre](**options("mean", pre)), cohort))
        bounded.append(prepared(registry.rules.clip(clip_norm=4.0), judged[-1]))
        assert bounded[-1].clip is None and float(lengths(bounded[-1]).max()) <= 4.0 * (1 + 1e-6)
    assert float(lengths(judged[0]).max()) > 4.0 or pre == "fltrust"
    torch.testing.assert_close(bounded[1].matrix_NS, bounded[0].matrix_NS, rtol=1e-3, atol=1e-3)
    # What was proved of the rows before is proved of their averages still.
    proved = prepared(registry.PRE[pre](**options("mean", pre)), replace(plain, clip=50.0))
    assert prepared(registry.rules.clip(clip_norm=4.0), proved).clip == proved.clip
    facts = registry.PRE[pre](**options("mean", pre)).proves(Facts(50.0, 0.5, 2))
    assert registry.rules.clip(clip_norm=4.0).proves(facts) == Facts()


def test_clip_before_sums_of_factors_is_what_it_was() -> None:
    cohort = lora_cohort(1, 4)
    for rule in ("mean", "median", "lora-mean"):
        wanted = result(chain(registry.PRE["clip"](clip_norm=3.0), registry.RULES[rule]()), cohort)
        assert torch.equal(result(made(rule, "clip"), cohort), wanted)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi", "adagrad"])
@pytest.mark.parametrize(
    ("rule", "pre"),
    [
        *((rule, "") for rule in CLOSING if rule != "lora-stack"),
        ("multi-krum", ""), ("fltrust", ""), ("foolsgold", ""),
        ("mean", "nnm"), ("mean", "module-screen"), ("norm-bounding", "clip,multi-krum"),
    ],
)  # fmt: skip
def test_server_optimizers_of_factors_that_are_cut_anew_are_refused(
    rule: str, pre: str, optimizer: str
) -> None:
    cohort = lora_cohort(0, SITES)
    base, deltas = LORA.unflatten(cohort.base_D), [LORA.unflatten(row) for row in cohort.rows]
    names = registry.split_names(pre)
    found = options(rule, *names)
    with pytest.raises(ConfigError, match=rf"'none' with LoRA factors .*{rule}, got '{optimizer}'"):
        aggregate(rule, base, deltas, pre=pre, server_optimizer=optimizer, **found)
    together.check_factors(rule, names, "none")
    together.check_factors("mean", ("clip",), optimizer)
    together.check_factors("trimmed-mean", ("multi-krum",), optimizer)


def test_a_server_optimizer_of_such_a_rule_would_turn_a_model_that_stands_still() -> None:
    """Why they are refused: after one update the sites send nothing, and the product moves on."""
    cohort, zeros = lora_cohort(0, 5), torch.zeros(5, LORA.size)
    far = []
    for rule in ("mean", "lora-svd"):
        stage = registry.compose(
            rule, (), "momentum", {"server_momentum": 0.0, "server_learning_rate": 0.5}
        )
        state, base_D, turned = stage.init(LORA.size), cohort.base_D, []
        for rows in (cohort.rows, zeros):
            now = replace(cohort, base_D=base_D, rows=list(rows))
            delta, state = stage.apply(state, now, torch.Generator())
            turned.append(update(now, delta.vector_D))
            base_D = base_D + delta.vector_D
        far.append(float(turned[1].norm() / turned[0].norm()))
    assert far[0] == 0.0 and far[1] > 0.2


def test_module_screen_comes_first() -> None:
    for pre in ("bucketing,module-screen", "clip,nnm,module-screen"):
        with pytest.raises(
            ConfigError, match=re.escape(f"first in strategy.pre, got '{pre}'; put")
        ):
            registry.compose("mean", registry.split_names(pre))
    registry.compose("mean", ("module-screen", "nnm"))


@given(SEEDS, st.floats(0.01, 10.0))
@settings(max_examples=25)
def test_after_fltrust_lora_stack_adds_the_products_whatever_they_are_scaled_by(
    seed: int, length: float
) -> None:
    cohort = lora_cohort(seed, 5)
    # Like the sites' own updates, so that some of them count, and longer or shorter.
    root = length * torch.stack(list(cohort.rows)).mean(0)
    cohort = replace(cohort, trusted_D=root)
    judged = prepared(registry.PRE["fltrust"](), cohort)
    wanted = judged.coefficients_S @ products(cohort)
    got = moved(made("lora-stack", "fltrust"), cohort)
    assert float((got - wanted).norm()) <= 1e-4 * max(1.0, float(wanted.norm()))


def test_layouts_without_pairs_go_with_everything() -> None:
    layout = Layout(("w",), ((4,),))
    rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    base, deltas = layout.unflatten(torch.zeros(4)), [layout.unflatten(row) for row in rows]
    for rule, pre in (("median", "nnm"), ("krum", ""), ("mean", "nnm")):
        kept = options(rule, *registry.split_names(pre))
        aggregate(rule, base, deltas, pre=pre, server_optimizer="momentum", **kept)


@pytest.mark.parametrize("name", [*registry.RULES, *(n for n in registry.PRE if n != "clip")])
def test_what_weights_are_nothing_to_gives_the_same_for_any_of_them(name: str) -> None:
    cohort = trusting(lora_cohort(1, 9))
    heavy = replace(cohort, weights_N=cohort.weights_N.flip(0))
    stage = made(name) if name in registry.RULES else made("mean", name)
    same = torch.equal(result(stage, cohort), result(stage, heavy))
    assert same is (name in together.UNWEIGHTED)


@pytest.mark.parametrize("name", [*registry.RULES, *(n for n in registry.PRE if n != "clip")])
def test_what_compares_updates_depends_on_loras_scale(name: str) -> None:
    stage = made(name) if name in registry.RULES else made("mean", name)
    pre = () if name in registry.RULES else (name,)
    small, large = (
        [result(stage, trusting(lora_cohort(seed, 9, lora_scale=scale))) for seed in range(12)]
        for scale in (1e-3, 1e3)
    )
    same = all(map(torch.equal, small, large))
    if name != "module-screen":  # which compares module by module
        assert same is not together.compares("mean" if pre else name, pre)


@pytest.mark.parametrize("weigher", together.WEIGHING)
@pytest.mark.parametrize("between", [(), ("clip",)])
def test_weights_that_nothing_would_mind_are_refused(weigher: str, between: Sequence[str]) -> None:
    for name in together.UNWEIGHTED:
        wanted = f"minds weights after '{weigher}' in strategy.pre, got '{name}', .*'mean' or"
        if name in registry.RULES:
            with pytest.raises(ConfigError, match=wanted):
                registry.compose(name, (weigher, *between))
        if name in registry.PRE:
            with pytest.raises(ConfigError, match=wanted):
                registry.compose("mean", (weigher, *between, name))
    for rule in ("mean", "norm-bounding", "lora-svd", "lora-stack"):
        made(rule, "nnm", weigher, *between)
