"""Linear combinations of rows: one pass over them, with the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A block of the sum and of one row fit into a core's cache together (1 MiB each).
_BLOCK = 1 << 18


def weighted_sum(rows: Sequence[Tensor], coefficients: Sequence[float], size: int) -> Tensor:
    """Sum of coefficient * row over rows of shape (`size`,), in order; O(N D) time, two rows kept.

    Rows with the coefficient 0 are not read.
    """
    total_D = torch.zeros(size)
    scratch = torch.empty(min(_BLOCK, size))
    for index, coefficient in enumerate(coefficients):
        if coefficient == 0.0:
            continue
        row_D = rows[index]
        for start in range(0, size, _BLOCK):
            piece = row_D[start : start + _BLOCK]
            # Product and sum are rounded apart. A fused multiply-add would be used or not
            # depending on where threads cut the vector, and bits would vary with their number.
            product = torch.mul(piece, coefficient, out=scratch[: len(piece)])
            total_D[start : start + _BLOCK].add_(product)
    return total_D


def chosen(coefficients_N: Tensor) -> int | None:
    """Index of the one row that these coefficients pick with weight 1; None for any other sum."""
    found = coefficients_N.nonzero().flatten().tolist()
    one = len(found) == 1 and float(coefficients_N[found[0]]) == 1.0
    return int(found[0]) if one else None


def mixed_bound(bound: float | None, mix_MN: Tensor) -> float | None:
    """L2 bound on each mixed row, where `bound` holds for each source row; None: no proof.

    Holds for averages and what is shorter: no negative coefficient and rows that sum to at most 1.
    """
    if bound is None or bool((mix_MN < 0).any()) or float(mix_MN.sum(1).max()) > 1.0 + 1e-12:
        return None
    terms = int((mix_MN != 0).sum(1).max())
    # One factor of at most 1 shortens, whatever the rounding. A sum of products in float32 is off
    # by half a unit in the last place for each operation, and for each coefficient.
    return bound if terms <= 1 else bound * (1.0 + (terms + 1) * 2.0**-23)
