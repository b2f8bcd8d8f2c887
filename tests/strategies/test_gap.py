"""The product gap in blocks of sites, and by whichever of its two ways is cheaper."""

from __future__ import annotations

import pytest
import torch

from models.layout import Layout
from strategies import gap
from strategies.cohort import Cohort

NAMES = ("m.lora_A.weight", "m.lora_B.weight")


@pytest.mark.parametrize(("fan_in", "fan_out"), [(40, 30), (3, 5)])
@pytest.mark.parametrize("columns", [1, 4, 256])
def test_blocks_add_up_to_the_dense_gap(
    fan_in: int, fan_out: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gap, "_COLUMNS", columns)
    generator = torch.Generator().manual_seed(columns)
    layout = Layout(NAMES, ((2, fan_in), (fan_out, 2)))

    def drawn() -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(shape, generator=generator)
            for name, shape in zip(layout.names, layout.shapes, strict=True)
        }

    base, weights = drawn(), [1.0, 2.0, 3.0, 4.0, 5.0]
    deltas = [drawn() for _ in weights]
    rows = {str(site): layout.flatten(delta) for site, delta in enumerate(deltas)}
    shares = {str(site): weight for site, weight in enumerate(weights)}
    found = gap.product_gap(Cohort.of(layout, layout.flatten(base), rows, shares))

    a, b = (torch.stack([base[name] + delta[name] for delta in deltas]).double() for name in NAMES)
    share_N = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    mean = torch.einsum("n,nor,nri->oi", share_N, b, a)
    apart = torch.einsum("n,nor->or", share_N, b) @ torch.einsum("n,nri->ri", share_N, a)
    assert found == pytest.approx(float((mean - apart).norm() / mean.norm()), rel=1e-5)
