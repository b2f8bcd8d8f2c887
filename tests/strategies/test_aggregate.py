"""The public function: named tensors in, named tensors out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.layout import LayoutError
from models.section import ConfigError
from strategies import aggregate
from strategies.cohort import CohortError

BASE = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[10.0]])}
FIRST = {"a": torch.tensor([4.0, 0.0]), "b": torch.tensor([[2.0]])}
SECOND = {"a": torch.tensor([0.0, 8.0]), "b": torch.tensor([[-2.0]])}


def listed(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def test_worked_by_hand() -> None:
    assert listed(aggregate("mean", BASE, [FIRST, SECOND])) == {"a": [3.0, 5.0], "b": [[10.0]]}
    weighted = aggregate("mean", BASE, [FIRST, SECOND], [3, 1])
    assert listed(weighted) == {"a": [4.0, 3.0], "b": [[11.0]]}
    assert listed(BASE) == {"a": [1.0, 1.0], "b": [[10.0]]}


def test_sites_by_name() -> None:
    straight = aggregate("mean", BASE, {"x": FIRST, "y": SECOND}, {"y": 1, "x": 3})
    assert listed(straight) == listed(aggregate("mean", BASE, [FIRST, SECOND], [3, 1]))


def test_tensors_go_by_name_not_by_position() -> None:
    turned = {"b": FIRST["b"], "a": FIRST["a"]}
    assert listed(aggregate("mean", BASE, [turned])) == {"a": [5.0, 1.0], "b": [[12.0]]}
    assert list(aggregate("mean", BASE, [turned])) == ["a", "b"]


def test_many_sites_keep_their_weights() -> None:
    deltas = [{"w": torch.tensor([float(i)])} for i in range(101)]
    new = aggregate("mean", {"w": torch.zeros(1)}, deltas, [1.0] * 100 + [100.0])
    assert new["w"].item() == pytest.approx((4950 + 100 * 100) / 200)


def test_stages_and_optimizers_by_name() -> None:
    clipped = aggregate("mean", BASE, [FIRST], pre="clip", clip_norm=math.sqrt(5.0))
    assert clipped["a"].tolist() == pytest.approx([3.0, 1.0])
    stepped = aggregate(
        "mean", BASE, [FIRST], server_optimizer="momentum", server_learning_rate=0.5
    )
    assert listed(stepped) == {"a": [3.0, 1.0], "b": [[11.0]]}


def test_dtype_of_the_base_is_kept_and_arithmetic_is_float32() -> None:
    base = {"w": torch.tensor([256.0], dtype=torch.bfloat16)}
    new = aggregate("mean", base, [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
    assert new["w"].dtype == torch.bfloat16 and new["w"].item() == 258.0


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"a": FIRST["a"]}, "'b', which is missing"),
        ({**FIRST, "c": torch.ones(1)}, "got 'c' too"),
        ({"a": torch.ones(1), "b": FIRST["b"]}, r"'a' of shape \(2,\), got \(1,\)"),
    ],
)
def test_deltas_that_do_not_fit(delta: dict[str, Tensor], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        aggregate("mean", BASE, [FIRST, delta])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_deltas_that_are_not_finite(bad: float) -> None:
    with pytest.raises(CohortError, match="finite numbers from 'y'"):
        aggregate("mean", BASE, {"x": FIRST, "y": {**SECOND, "b": torch.tensor([[bad]])}})


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, 0], [1, math.nan]])
def test_weights_that_do_not_fit(weights: list[float]) -> None:
    with pytest.raises(CohortError, match="weight"):
        aggregate("mean", BASE, [FIRST, SECOND], weights)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"Unknown strategy\.rule 'avg'\. Choices: .*mean"):
        aggregate("avg", BASE, [FIRST])
    with pytest.raises(
        ConfigError, match="Expected no options for mean, none, got 'num_byzantine'"
    ):
        aggregate("mean", BASE, [FIRST], num_byzantine=2)
    with pytest.raises(CohortError, match="at least one update"):
        aggregate("mean", BASE, [])


def test_a_trusted_update_and_the_scale_of_lora_reach_the_rules() -> None:
    trusted = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([[0.0]])}
    found = aggregate("fltrust", BASE, [FIRST], trusted=trusted)
    assert math.hypot(*(found["a"] - 1).tolist(), found["b"].item() - 10) == pytest.approx(2.0)
    with pytest.raises(CohortError, match="finite numbers from 'trusted'"):
        aggregate("fltrust", BASE, [FIRST], trusted=trusted | {"b": torch.tensor([[math.nan]])})
    with pytest.raises(ConfigError, match=r"set strategy\.root-source, or pass trusted="):
        aggregate("fltrust", BASE, [FIRST])
    base = {"m.lora_A.weight": torch.ones(1, 1), "m.lora_B.weight": torch.zeros(1, 1)}
    base |= {"head": torch.zeros(1)}
    near = [(3.0, 0.0), (0.0, 0.0), (0.0, 5.0)]  # (product, head)
    deltas = [
        {"m.lora_A.weight": torch.zeros(1, 1), "m.lora_B.weight": torch.tensor([[product]]),
         "head": torch.tensor([head])}
        for product, head in near
    ]  # fmt: skip
    # At scale 1 the first two are nearest to each other, at scale 100 the last two.
    for scale, product in ((1.0, 3.0), (100.0, 0.0)):
        new = aggregate("krum", base, deltas, lora_scale=scale, num_byzantine=0)
        assert new["m.lora_B.weight"].item() == product
