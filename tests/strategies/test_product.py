from __future__ import annotations

import pytest
import torch

from models.layout import Layout
from strategies import aggregate
from strategies.product import stacked, structure, truncated

NAMES = (
    "x.q.lora_A.weight",
    "x.q.lora_B.weight",
    "head.weight",
    "x.k.lora_B.weight",
    "x.k.lora_A.weight",
)
SHAPES = ((2, 5), (7, 2), (3, 4), (6, 3), (3, 5))


def test_pairs_are_found_wherever_they_stand() -> None:
    layout = Layout(NAMES, SHAPES)
    found = structure(layout)
    vector = torch.arange(layout.size, dtype=torch.float32)
    named = layout.unflatten(vector)
    assert [pair.module for pair in found.pairs] == ["x.q", "x.k"]
    for pair in found.pairs:
        a, b = pair.factors(vector)
        assert torch.equal(a, named[pair.a]) and torch.equal(b, named[pair.b])
    assert torch.equal(
        torch.cat([vector[s] for s in found.others]), named["head.weight"].reshape(-1)
    )


@pytest.mark.parametrize(
    ("names", "shapes"),
    [
        (("a.lora_A.weight", "b.lora_B.weight"), ((2, 5), (7, 2))),
        (("a.lora_A.weight", "a.lora_B.weight"), ((2, 5, 1, 1), (7, 2, 1, 1))),
        (("a.weight", "b.weight"), ((2, 5), (7, 2))),
        (("a.lora_A", "a.lora_B", "a.lora_E"), ((2, 5), (7, 2), (2, 1))),
    ],
)
def test_what_is_no_pair_is_left_alone(
    names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
) -> None:
    found = structure(Layout(names, shapes))
    assert found.pairs == () and len(found.others) == len(names)


@pytest.mark.parametrize("rule", ["krum", "geometric-median", "centered-clipping", "fltrust"])
def test_adaloras_factors_stay_as_they_are_where_nobody_trains(rule: str) -> None:
    """Its change is B diag(E) A: factors cut anew from B A would change it under the same E."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x.lora_A": (3, 6), "x.lora_B": (5, 3), "x.lora_E": (3, 1)}
    base = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    still = {name: torch.zeros(shape) for name, shape in shapes.items()}
    new = aggregate(rule, base, [still] * 5, trusted=still)
    assert new.keys() == base.keys()
    assert all(torch.equal(new[name], base[name]) for name in base)


@pytest.mark.parametrize("sites", [1, 3, 9])  # 9 * 3 ranks are more than the module has
def test_the_stack_is_the_sum_of_products_and_truncation_the_best_of_its_rank(sites: int) -> None:
    generator = torch.Generator().manual_seed(sites)
    factors = [
        (torch.randn(3, 12, generator=generator), torch.randn(10, 3, generator=generator))
        for _ in range(sites)
    ]
    weights = [1 / (i + 2) for i in range(sites)]
    wanted = sum(
        (w * b.double() @ a.double() for (a, b), w in zip(factors, weights, strict=True)),
        torch.zeros(10, 12, dtype=torch.float64),
    )
    left, right = stacked(factors, weights)
    torch.testing.assert_close(left.double() @ right.double(), wanted, rtol=1e-5, atol=1e-5)
    u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
    for rank in (1, 4, 10):
        a, b = truncated(left, right, rank)
        best = u[:, :rank] @ s[:rank].diag() @ vh[:rank]
        torch.testing.assert_close(b.double() @ a.double(), best, rtol=1e-5, atol=1e-5)
