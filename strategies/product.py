"""LoRA updates in product space: what the pairs of factors A and B of a layout multiply to.

Shape suffixes: R rank, I inputs and O outputs of the adapted module. Products are without LoRA's
scale alpha / rank, which is the same for all sites. (-A, -B) and (kA, B/k) are one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from models.layout import CONTROL, Layout

_A, _B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")


@dataclass(frozen=True)
class Pair:
    """The factors of one adapted module as a layout has them: A of shape (R, I), B (O, R)."""

    module: str
    a: str
    b: str
    a_start: int
    b_start: int
    rank: int
    fan_in: int
    fan_out: int

    def factors(self, vector_D: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a vector of shape (D,) as A (R, I) and B (O, R)."""
        a = vector_D[self.a_start : self.a_start + self.rank * self.fan_in]
        b = vector_D[self.b_start : self.b_start + self.rank * self.fan_out]
        return a.view(self.rank, self.fan_in), b.view(self.fan_out, self.rank)


@dataclass(frozen=True)
class Structure:
    """A layout taken apart: its pairs, and the slices of (D,) that belong to no pair."""

    pairs: tuple[Pair, ...]
    others: tuple[slice, ...]


@lru_cache(maxsize=64)
def structure(layout: Layout) -> Structure:
    """Pairs of LoRA factors in `layout`, in its order; a factor without a partner is no pair.

    Nor are the factors of AdaLoRA, which adds B diag(E) A.
    """
    starts: dict[str, tuple[int, tuple[int, ...]]] = {}
    at = 0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        starts[name] = (at, shape)
        at += prod(shape)
    pairs = [pair for name in layout.names if (pair := _pair(name, starts))]
    taken = {name for pair in pairs for name in (pair.a, pair.b)}
    others = [
        slice(start, start + prod(shape))
        for name, (start, shape) in starts.items()
        if name not in taken
    ]
    return Structure(tuple(pairs), tuple(others))


def _pair(name: str, starts: dict[str, tuple[int, tuple[int, ...]]]) -> Pair | None:
    if name.startswith(CONTROL):
        return None  # gradients of factors, whose product means nothing
    parts = name.split(".")
    kind = next((i for i, part in enumerate(parts) if part in _A), None)
    if kind is None:
        return None

    def sibling(part: str) -> str:
        return ".".join([*parts[:kind], part, *parts[kind + 1 :]])

    partner = sibling(_B[_A.index(parts[kind])])
    if partner not in starts or sibling("lora_E") in starts:
        return None
    (a_start, a_shape), (b_start, b_shape) = starts[name], starts[partner]
    # Convolutions have four dimensions and no such product.
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1]:
        return None
    module = ".".join(parts[:kind])
    return Pair(module, name, partner, a_start, b_start, a_shape[0], a_shape[1], b_shape[0])


def side(name: str) -> str:
    """`A` or `B` for a tensor that is a LoRA factor by its name, with or without a partner."""
    parts = set(name.split("."))
    return "A" if parts & set(_A) else "B" if parts & set(_B) else ""


def stacked(
    factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Factors (left, right) of the weighted sum of B @ A: left (O, N R), right (N R, I).

    `factors` holds (A, B) of each site. Nothing is lost and no product of shape (O, I) is built.
    """
    left = torch.cat([b * weight for (_, b), weight in zip(factors, weights, strict=True)], dim=1)
    return left, torch.cat([a for a, _ in factors], dim=0)


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of left (O, K) @ right (K, I) of rank `rank`: A (rank, I), B (O, rank).

    A has orthonormal rows, B carries the singular values (FlexLoRA: B = U S, A = V^T); missing
    ranks are zero. In float64, and on the factors alone where they are smaller than the product.
    """
    left, right = left.double(), right.double()
    if left.shape[1] < min(left.shape[0], right.shape[1]):
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        u, vh = q_left @ u, vh @ q_right.T
    else:
        u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
    kept = min(rank, len(s))
    a = torch.zeros(rank, right.shape[1], dtype=torch.float64)
    b = torch.zeros(left.shape[0], rank, dtype=torch.float64)
    a[:kept], b[:, :kept] = vh[:kept], u[:, :kept] * s[:kept]
    return a.float(), b.float()
