"""Inner products of the sites' updates: what rules that judge whole updates look at.

Shape suffixes: N sites, D parameters, R rank, I inputs and O outputs of an adapted module.
Everything is float64: the float32 expansion |x|^2 - 2<x,y> + |y|^2 goes negative for updates that
are close to each other. With LoRA factors in the layout an update of a module is the product that
it adds, U = B A - B_0 A_0, times alpha / rank, so that (-A, -B) and (kA, B/k) change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from strategies.cohort import Cohort, LazyRows, MixedRows
from strategies.product import Pair, structure

# Float32 elements of rows that are held at a time where rows are made on demand (1 GiB).
_HELD = 1 << 28
# Float64 elements that a block of columns has (8 MiB), within reach of the caches.
_COLUMNS = 1 << 20
# Rows of a strip: products below the diagonal are left out, strip by strip.
_STRIP = 64
# Ranks, added up over sites, that enter one product of factors.
_RANKS = 512

Kernel = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def gram(cohort: Cohort) -> Tensor:
    """Inner products of all pairs of updates, shape (N, N), float64.

    Computed once for the source of a mixed cohort, whose own is C G C^T. O(N^2 D) time for plain
    layouts, blocks of rows and columns in memory; with LoRA factors O(N^2 R^2 (I + O)) a module.
    """
    source = cohort.source
    if "gram" not in source.memo:
        source.memo["gram"] = _inner(source, source.rows)
    if cohort is source:
        return source.memo["gram"]
    mix = cohort.matrix_NS
    return mix @ source.memo["gram"] @ mix.T


def lengths(cohort: Cohort) -> Tensor:
    """Norms of the updates as `gram` has them, (N,), float64; one row at a time where not mixed."""
    if cohort is cohort.source and "gram" not in cohort.memo:
        squares = [_inner(cohort, [row_D]).squeeze() for row_D in cohort.rows]
        return torch.stack(squares).clamp_(min=0.0).sqrt()
    return gram(cohort).diagonal().clamp(min=0.0).sqrt()


def squared_distances(gram_NN: Tensor) -> Tensor:
    """Squared distances |x_i - x_j|^2, (N, N), of vectors with these inner products; 0 or more."""
    squares_N = gram_NN.diagonal()
    distances = (squares_N[:, None] + squares_N - 2.0 * gram_NN).clamp_(min=0.0)
    return distances.fill_diagonal_(0.0)


def extended(cohort: Cohort, extra: Sequence[Tensor]) -> Cohort:
    """The cohort with K rows (D,) put after its own, of weight 0, for vectors that are no site's.

    Such as FLTrust's root update and the centre of centred clipping. A new source; what is known
    of the old one's inner products is kept and only those with the extra rows are added.
    """
    source, more = cohort.source, list(extra)
    count = len(source.rows)
    joined = Cohort(
        source.base_D,
        LazyRows(count + len(more), lambda i: source.rows[i] if i < count else more[i - count]),
        torch.cat([source.weights_N, torch.zeros(len(more))]),
        (*source.names, *_later(source.names[-1], len(more))),
        source.layout,
        lora_scale=source.lora_scale,
    )
    known, cross = gram(source), _inner(source, source.rows, more)
    below = torch.cat([cross.T, _inner(source, more)], dim=1)
    joined.memo["gram"] = torch.cat([torch.cat([known, cross], dim=1), below])
    mix = torch.block_diag(cohort.matrix_NS, torch.eye(len(more), dtype=torch.float64))
    names = (*cohort.names, *_later(cohort.names[-1], len(more)))
    weights = torch.cat([cohort.weights_N, torch.zeros(len(more))])
    return replace(joined, rows=MixedRows(joined, mix), names=names, weights_N=weights)


def _later(name: str, count: int) -> list[str]:
    """Names that are sorted after `name`, with which they begin."""
    return [f"{name}+{index:06d}" for index in range(count)]


def _inner(cohort: Cohort, left: Sequence[Tensor], right: Sequence[Tensor] | None = None) -> Tensor:
    """Inner products of the updates `left` and `right`, (N, M); of `left` with itself if None."""
    found = structure(cohort.layout)
    ranks = max((pair.rank for pair in found.pairs), default=0)
    step = max(1, _HELD // (2 * cohort.layout.size))
    if ranks:
        step = min(step, max(1, _RANKS // ranks))
    scale = cohort.lora_scale**2

    def kernel(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(len(a), len(b), dtype=torch.float64)
        for pair in found.pairs:
            total += _products(pair, cohort.base_D, a, b) * scale
        for part in found.others:
            total += _flat([row[part] for row in a], [row[part] for row in b], a is b)
        return total

    return _tiled(left, right, step, kernel)


def _tiled(
    left: Sequence[Tensor], right: Sequence[Tensor] | None, step: int, kernel: Kernel
) -> Tensor:
    """`kernel` on `step` by `step` rows at a time, those above the diagonal only if right is None.

    Rows are held while their tile is worked on, so that those made on demand are made N / `step`
    times and not once for each block of columns.
    """
    other = left if right is None else right
    out = torch.zeros(len(left), len(other), dtype=torch.float64)
    for top in range(0, len(left), step):
        a = list(left[top : top + step])
        for start in range(top if right is None else 0, len(other), step):
            b = a if right is None and start == top else list(other[start : start + step])
            out[top : top + len(a), start : start + len(b)] = kernel(a, b)
    return out if right is not None else out.triu() + out.triu(1).T


def _flat(a: Sequence[Tensor], b: Sequence[Tensor], same: bool) -> Tensor:
    """Inner products of plain vectors, (N, M); above the diagonal only where a and b are the same.

    A difference of updates is taken in float64: at |w| = 20 and |delta| = 0.01 float32 is lost.
    """
    size = len(a[0])
    width = max(1024, _COLUMNS // (len(a) + (0 if same else len(b))))
    out = torch.zeros(len(a), len(b), dtype=torch.float64)
    for start in range(0, size, width):
        left = torch.stack([row[start : start + width] for row in a]).double()
        right = left if same else torch.stack([row[start : start + width] for row in b]).double()
        for top in range(0, len(a), _STRIP):
            first = top if same else 0
            out[top : top + _STRIP, first:] += left[top : top + _STRIP] @ right[first:].T
    return out


def _products(pair: Pair, base_D: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner products of what the rows of a and b add to one module, (N, M).

    U_i = dB_i A_i + B_0 dA_i, and <L R, L' R'> = sum of (L^T L') * (R R'^T) over the ranks: no
    matrix (O, I) is built and nothing large cancels, because the base's product is never formed.
    """
    base_a, base_b = (factor.double() for factor in pair.factors(base_D))

    def sides(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        factors = [pair.factors(row_D) for row_D in rows]
        left = torch.stack([b.double() for _, b in factors])  # (N, O, R)
        shift = torch.stack([a.double() for a, _ in factors])  # (N, R, I)
        constant = base_b.expand(len(rows), *base_b.shape)
        return torch.cat([left, constant], dim=2), torch.cat([shift + base_a, shift], dim=1)

    (left, right), (left_b, right_b) = sides(a), sides(b)
    wide = 2 * pair.rank
    inner = _grouped(left.transpose(1, 2), left_b.transpose(1, 2), wide)
    outer = _grouped(right, right_b, wide)
    return (inner * outer).sum((1, 3))


def _grouped(a: Tensor, b: Tensor, wide: int) -> Tensor:
    """Inner products of the rows of a (N, K, X) and b (M, K, X), shape (N, K, M, K)."""
    flat = a.reshape(-1, a.shape[2]) @ b.reshape(-1, b.shape[2]).T
    return flat.view(len(a), wide, len(b), wide)
