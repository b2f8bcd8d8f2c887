"""What attacks send, on small numbers: each one's defining equation, and its limits."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from models.section import ConfigError
from strategies.attacks.colluding import largest
from strategies.attacks.config import AttackConfig
from strategies.attacks.registry import ATTACKS, malicious, pick
from strategies.attacks.structural import modules
from strategies.attacks.view import View

LORA = Layout(
    ("h.0.q.lora_A.weight", "h.0.q.lora_B.weight", "head.weight", "head.bias"),
    ((2, 3), (4, 2), (2, 4), (2,)),
)
PLAIN = Layout(("x",), ((4,),))


def view(honest: int = 6, own: int = 2, layout: Layout = LORA, seed: int = 0) -> View:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = draw(honest, layout.size) + draw(layout.size)
    return View(rows, draw(own, layout.size), draw(layout.size), layout)


def small(honest: list[list[float]], own: list[list[float]]) -> View:
    layout = Layout(("x",), ((len(honest[0]),),))
    return View(torch.tensor(honest), torch.tensor(own), torch.zeros(layout.size), layout)


def forge(name: str, known: View, seed: int = 0, **options: Any) -> Tensor:
    config = AttackConfig(name=name, **options)
    sent = pick(config).forged(known, config, torch.Generator().manual_seed(seed))
    assert sent.shape == known.own_MD.shape and sent.dtype == torch.float32
    return sent


REWRITING = sorted(name for name, attack in ATTACKS.items() if attack.rewrites)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_same_seed_same_bits_and_the_view_is_left_alone(name: str) -> None:
    known, twin = view(), view()
    scale = {"free-rider": 0.5}.get(name, 0.0)
    assert torch.equal(forge(name, known, scale=scale), forge(name, known, scale=scale))
    for mine, before in zip(vars(known).values(), vars(twin).values(), strict=True):
        assert mine == before if isinstance(mine, Layout) else torch.equal(mine, before)


def test_sign_flip_and_scaling_multiply_the_own_update() -> None:
    known = small([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[1.0, -2.0]])
    assert forge("sign-flip", known).tolist() == [[-4.0, 8.0]]
    assert forge("sign-flip", known, scale=1.0).tolist() == [[-1.0, 2.0]]
    assert forge("scaling", known).tolist() == [[4.0, -8.0]]  # 4 sites, 1 of them malicious
    assert forge("scaling", known, scale=7.0).tolist() == [[7.0, -14.0]]


def test_scaling_replaces_what_the_mean_gives() -> None:
    # Bagdasaryan et al.: where honest updates cancel, the model becomes the attacker's.
    known = small([[1.0], [-1.0], [2.0], [-2.0]], [[0.5], [0.7]])
    everyone = torch.cat([known.honest_ND, forge("scaling", known)])
    assert everyone.mean(0).item() == pytest.approx(0.6)


def test_noise_has_the_size_that_it_says() -> None:
    layout = Layout(("x",), ((20_000,),))
    known = View(torch.full((3, 20_000), 2.0), torch.ones(2, 20_000), torch.zeros(20_000), layout)
    assert forge("gaussian", known).std().item() == pytest.approx(20.0, rel=0.03)
    assert forge("gaussian", known).mean().item() == pytest.approx(0.0, abs=0.5)
    assert not torch.equal(*forge("gaussian", known))
    assert not torch.equal(forge("gaussian", known, seed=0), forge("gaussian", known, seed=1))
    assert forge("free-rider", known).count_nonzero() == 0
    disguised = forge("free-rider", known, scale=0.5)
    length = math.sqrt(20_000) * 2.0
    assert disguised.norm(dim=1).tolist() == pytest.approx([length / 2] * 2, rel=0.03)


def test_sybils_send_one_update() -> None:
    known = small([[0.0]], [[1.0], [2.0], [6.0]])
    assert forge("sybil", known).tolist() == [[3.0]] * 3


def test_alie_stays_within_its_deviations_of_the_mean() -> None:
    known = small([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]], [[9.0, 9.0]])
    deviation = math.sqrt(8 / 3)
    got = forge("alie", known, scale=1.5)[0]
    assert got.tolist() == pytest.approx([2 - 1.5 * deviation, 5.0])
    # Of n = 4 with f = 1, s = 2 of 3 honest ones would have to be farther out: no room at all.
    assert forge("alie", known)[0].tolist() == pytest.approx([2.0, 5.0])
    # Of n = 50 with f = 24 only s = 2 have to, and z is the quantile of 24 / 26.
    many = view(26, 24)
    z = NormalDist().inv_cdf(24 / 26)
    deviation_D, mean_D = torch.std_mean(many.honest_ND, 0, correction=0)
    assert torch.allclose(forge("alie", many)[0], mean_D - z * deviation_D, atol=1e-5)
    assert z == pytest.approx(1.426, abs=1e-3)


def test_ipm_is_against_the_honest_mean() -> None:
    known = small([[1.0, -2.0], [3.0, 0.0]], [[9.0, 9.0], [9.0, 9.0]])
    assert forge("ipm", known).tolist() == [[-1.0, 0.5]] * 2
    assert forge("ipm", known, scale=3.0).tolist() == [[-6.0, 3.0]] * 2


def test_mimic_copies_the_site_that_stands_out() -> None:
    honest = [[0.5, 0.0], [0.0, 0.5], [-0.5, 0.0], [9.0, 0.25], [0.0, -0.5]]
    assert forge("mimic", small(honest, [[0.0, 0.0]] * 2)).tolist() == [honest[3]] * 2


def distances(known: View, sent: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances to the honest updates, and between them."""
    honest = known.honest_ND.double()
    return (honest - sent.double()).square().sum(1), torch.cdist(honest, honest).square()


@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), honest=st.integers(2, 9), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_min_max_and_min_sum_keep_their_bounds_and_reach_them(
    direction: str, seed: int, honest: int, size: float
) -> None:
    known = view(honest, 2, PLAIN, seed)
    known = View(known.honest_ND * size, known.own_MD, known.base_D, PLAIN)
    to, between = distances(known, forge("min-max", known, direction=direction)[0])
    assert float(to.max()) == pytest.approx(float(between.max()), rel=1e-3)
    assert float(to.max()) <= float(between.max()) * (1 + 1e-5)
    to, between = distances(known, forge("min-sum", known, direction=direction)[0])
    assert float(to.sum()) == pytest.approx(float(between.sum(1).max()), rel=1e-3)
    assert float(to.sum()) <= float(between.sum(1).max()) * (1 + 1e-5)


@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
@pytest.mark.parametrize("name", ["min-max", "min-sum"])
def test_honest_sites_that_agree_leave_nowhere_to_push(name: str, direction: str) -> None:
    known = small([[1.0, -2.0]] * 3, [[9.0, 9.0]])
    assert forge(name, known, direction=direction)[0].tolist() == pytest.approx([1.0, -2.0])


@pytest.mark.parametrize("bound", [0.0, 1e-3, 1.0, 10.0, 123456.0])
def test_the_search_finds_the_largest(bound: float) -> None:
    assert largest(lambda gamma: gamma <= bound) == pytest.approx(bound, rel=1e-4, abs=1e-9)
    assert largest(lambda gamma: gamma <= bound) <= bound


def products(known: View, row_D: Tensor) -> Tensor:
    named = LORA.unflatten(known.base_D + row_D)
    return named["h.0.q.lora_B.weight"] @ named["h.0.q.lora_A.weight"]


@pytest.mark.parametrize("name", ["gauge-flip", "factor-scaling"])
def test_turned_factors_multiply_to_the_same(name: str) -> None:
    known = view()
    for sent, own in zip(forge(name, known), known.own_MD, strict=True):
        assert torch.allclose(products(known, sent), products(known, own), atol=1e-5)
        assert torch.allclose(sent[14:], own[14:], atol=1e-6)  # the head is no factor
        assert not torch.allclose(sent[:14], own[:14])
    factor = {"gauge-flip": -1.0, "factor-scaling": 10.0}[name]
    a = (known.base_D + forge(name, known)[0])[:6]
    assert torch.allclose(a, factor * (known.base_D + known.own_MD[0])[:6], atol=1e-5)


@pytest.mark.parametrize("name", ["gauge-flip", "factor-scaling"])
def test_factors_are_needed_to_turn_them(name: str) -> None:
    with pytest.raises(ConfigError, match=r"LoRA factors.*payload\.kind='lora'"):
        forge(name, view(layout=PLAIN))


def test_one_layer_hides_in_the_whole_norm() -> None:
    known = view()
    sent = forge("one-layer", known)
    parts = modules(LORA)
    assert {name: len(at) for name, at in parts.items()} == {"h.0.q": 14, "head": 10}
    mean = known.honest_ND.mean(0)
    touched = max(parts, key=lambda name: float(mean[parts[name]].norm()))
    (other,) = set(parts) - {touched}
    assert sent[:, parts[other]].count_nonzero() == 0
    assert torch.nn.functional.cosine_similarity(
        sent[0, parts[touched]], -mean[parts[touched]], dim=0
    ).item() == pytest.approx(1.0)
    lengths = known.honest_ND.norm(dim=1)
    assert float(lengths.min()) <= float(sent[0].norm()) <= float(lengths.max()) * 1.0001
    assert torch.equal(sent[0], sent[1])


def test_an_unknown_attack_lists_the_choices() -> None:
    with pytest.raises(
        ConfigError, match=r"attack\.name 'signflip'.*Did you mean 'sign-flip'.*ipm"
    ):
        pick(AttackConfig(name="signflip"))
    with pytest.raises(ConfigError, match=r"attack\.scale=0.*'mimic'.*got 2.*sign-flip"):
        pick(AttackConfig(name="mimic", scale=2.0))


def test_malicious_sites_are_drawn_by_name_and_seed() -> None:
    names = [f"site-{i:02}" for i in range(20)]
    config = AttackConfig(name="sign-flip", fraction=0.3)
    drawn = malicious(names, config, 1)
    assert len(drawn) == 6 and drawn <= set(names)
    assert malicious(reversed(names), config, 1) == drawn
    assert malicious(names, config, 2) != drawn
    # More attackers are the same ones and some more, so that fractions can be compared.
    assert malicious(names, config.model_copy(update={"fraction": 0.1}), 1) < drawn
    assert malicious(names, config.model_copy(update={"name": "none"}), 1) == frozenset()
    assert len(malicious(["a", "b"], config.model_copy(update={"fraction": 0.01}), 0)) == 1
