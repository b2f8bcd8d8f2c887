"""What averaging LoRA's factors A and B apart loses against averaging the products B A.

Shape suffixes as in `product`: N sites, D parameters, R rank, I inputs, O outputs of a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from strategies.cohort import Cohort
from strategies.lora import terms
from strategies.mixing import weighted_sum
from strategies.product import Pair, structure

Factors = tuple[Tensor, Tensor]  # A (R, I) and B (O, R), float64
_COLUMNS = 256  # components, or rows of a product, that are in memory at a time


def product_gap(cohort: Cohort, rule: str = "") -> float | None:
    """Relative error of averaging A and B apart; None for a layout without pairs.

    ||mean(B A) - mean(B) mean(A)|| / ||mean(B A)||, Frobenius over all pairs. The difference is the
    mean of (B - mean(B)) (A - mean(A)), in which the base cancels, so that both norms are those of
    a mean of products. Memory of a few sites' factors of one module, whatever N; O((N R)^2 (I + O))
    per pair, or O(N R I O) where that is less.
    """
    pairs = structure(cohort.layout).pairs
    if not pairs:  # with a factor A that all have in common nothing is lost
        return 0.0 if rule == "lora-freeze-a" else None
    rows, shares_N = terms(cohort)
    mean_D = weighted_sum(rows, shares_N.tolist(), cohort.layout.size)
    gap = total = 0.0
    for pair in pairs:
        gap += _square(pair, rows, shares_N, _moved(pair, mean_D, -1.0))
        total += _square(pair, rows, shares_N, _moved(pair, cohort.base_D, 1.0))
    return math.sqrt(gap / total) if total > 0 else 0.0


def _moved(pair: Pair, by_D: Tensor, sign: float) -> Callable[[Tensor], Factors]:
    """Takes the factors of `pair` out of a row and adds those of sign * `by_D` to them."""
    by_a, by_b = (factor.double() * sign for factor in pair.factors(by_D))

    def factors(row_D: Tensor) -> Factors:
        a, b = pair.factors(row_D)
        return by_a + a, by_b + b

    return factors


def _square(
    pair: Pair, rows: Sequence[Tensor], shares_N: Tensor, factors: Callable[[Tensor], Factors]
) -> float:
    """Squared Frobenius norm of the sum over sites of share * B A, in float64."""
    columns = len(rows) * pair.rank
    if columns * (pair.fan_in + pair.fan_out) > pair.fan_in * pair.fan_out:
        return math.fsum(_by_product(pair, rows, shares_N, factors))
    return max(math.fsum(_by_grams(pair, rows, shares_N, factors)), 0.0)


def _by_product(
    pair: Pair, rows: Sequence[Tensor], shares_N: Tensor, factors: Callable[[Tensor], Factors]
) -> Iterator[float]:
    """Squares of the product's entries, a few of its rows at a time."""
    for start in range(0, pair.fan_out, _COLUMNS):
        size = min(_COLUMNS, pair.fan_out - start)
        product = torch.zeros(size, pair.fan_in, dtype=torch.float64)
        for row_D, share in zip(rows, shares_N.tolist(), strict=True):
            a, b = factors(row_D)
            product.addmm_(b[start : start + size], a, alpha=share)
        yield float(product.square().sum())


def _by_grams(
    pair: Pair, rows: Sequence[Tensor], shares_N: Tensor, factors: Callable[[Tensor], Factors]
) -> Iterator[float]:
    """Inner products <B_i A_i, B_j A_j> = tr((B_i^T B_j) (A_j A_i^T)), of two blocks of sites."""
    sites = max(_COLUMNS // pair.rank, 1)

    def block(start: int) -> Factors:
        found = [factors(row_D) for row_D in rows[start : start + sites]]
        shares = shares_N[start : start + sites].tolist()
        left = torch.cat([b * share for (_, b), share in zip(found, shares, strict=True)], dim=1)
        return torch.cat([a for a, _ in found]), left

    for start in range(0, len(rows), sites):
        right_i, left_i = block(start)
        yield float(((left_i.T @ left_i) * (right_i @ right_i.T)).sum())
        for other in range(start + sites, len(rows), sites):
            right_j, left_j = block(other)
            yield 2.0 * float(((left_i.T @ left_j) * (right_i @ right_j.T)).sum())
