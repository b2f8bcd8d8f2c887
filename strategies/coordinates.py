"""Rules that look at one coordinate at a time: median, trimmed mean, and what they share.

Shape suffixes: N sites, D parameters, C coordinates of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.cohort import Cohort, CohortError, Delta, LazyRows
from strategies.conditions import NumByzantine, tolerated
from strategies.product import structure
from strategies.stage import Rule, Stage, pure

Array: TypeAlias = NDArray[np.float32]

# Float32 elements of all rows that a thread has mapped at a time (128 MiB).
_MAPPED = 1 << 25
# Float32 elements that a thread sorts at a time (512 KiB), within a core's second-level cache,
_BLOCK = 1 << 17
# but for the fewest coordinates that make a call of numpy worth its while.
_CALL = 4096
# Up to so many rows a sorting network over whole rows is faster than sorting each coordinate.
_NETWORK = 16


def median() -> Rule:
    """Coordinate-wise median (Yin et al. 2018, Definition 1); even N: mean of the middle two.

    Sites count alike: their weights are ignored. Breakdown point 1/2: while fewer than half of
    the sites lie, each coordinate stays within the range of the honest ones. O(D N log N) time,
    memory of one delta and a block of rows. Raises CohortError for LoRA factors with different A,
    or whose products were judged, since liars may then be most of those that were kept.
    """

    def apply(cohort: Cohort) -> Delta:
        _refuse_judged_factors(cohort)
        low, high = (len(cohort.names) - 1) // 2, len(cohort.names) // 2
        return per_coordinate(cohort, lambda x_NC: mean_of(x_NC[low : high + 1]), "median")

    return Stage("median", Cohort, Delta, pure(apply))


def trimmed_mean(*, num_byzantine: NumByzantine = 1) -> Rule:
    """Coordinate-wise mean without the f least and f greatest values (Yin et al. 2018, Def. 2).

    f is `num_byzantine`, beta N in the paper. Sites count alike: their weights are ignored.
    Breakdown point f / N: while at most f of N >= 2f+1 sites lie, each coordinate stays within the
    range of the honest ones. O(D N log N) time, memory of one delta and a block of rows. Raises
    CohortError for fewer sites, and for LoRA factors with different A, or mixed after their
    products were judged.
    """

    def lies(count: int, caught: int = 0) -> int:
        return tolerated(count, num_byzantine, 2, 1, caught)

    def requires(count: int) -> int:
        lies(count)
        return count

    def apply(cohort: Cohort) -> Delta:
        f = lies(len(cohort.names), cohort.caught)
        kept = slice(f, len(cohort.names) - f)
        return per_coordinate(cohort, lambda x_NC: mean_of(x_NC[kept]), "trimmed-mean")

    return Stage("trimmed-mean", Cohort, Delta, pure(apply), requires=requires)


def mean_of(rows_NC: Array) -> Array:
    """Mean over the first axis, (C,), added up in float64: it stays within the values' range."""
    total_C = np.add.reduce(rows_NC, axis=0, dtype=np.float64)
    mean_C: Array = (total_C / len(rows_NC)).astype(np.float32)
    return mean_C


def per_coordinate(cohort: Cohort, reduce: Callable[[Array], Array], rule: str) -> Delta:
    """Apply `reduce` to the sorted values of each coordinate: blocks (N, C), ascending, to (C,).

    The result does not depend on the order of the rows, not even by the sign of a zero, nor on
    threads. Raises CohortError where a coordinate does not mean the same at all sites.
    """
    _refuse_own_factors(cohort, rule)
    _refuse_mixed_factors(cohort, rule)
    rows, mix_NS = _read(cohort)
    size, threads = cohort.layout.size, torch.get_num_threads()
    out_D = np.empty(size, dtype=np.float32)
    width = max(1, min(_MAPPED // len(rows), math.ceil(size / threads)))

    def stretch(start: int) -> None:
        pieces = [row_D[start : start + width].numpy() for row_D in rows]
        for at, values_NC, scratch in _blocks(pieces, mix_NS):
            sort = _by_network if len(values_NC) <= _NETWORK else _by_column
            end = start + at + values_NC.shape[1]
            out_D[start + at : end] = reduce(sort(values_NC, scratch))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stretch, range(0, size, width)))  # a list, so that errors are raised
    return Delta(torch.from_numpy(out_D), cohort.layout)


def _refuse_own_factors(cohort: Cohort, rule: str) -> None:
    for pair in structure(cohort.layout).pairs:
        if any(factor.any() for factor in pair.factors(cohort.base_D)):
            continue
        for name, row_D in zip(cohort.source.names, cohort.source.rows, strict=True):
            if pair.factors(row_D)[0].any():
                raise CohortError(
                    "Expected sites that all start from the A factors that the server sends, got "
                    f"A drawn by {name!r} itself in {pair.module!r}: a coordinate then means "
                    f"something else at each site and {rule} is meaningless; use krum, "
                    "geometric-median or lora-svd, which compare the products B A."
                )


def _judged_factors(cohort: Cohort) -> bool:
    return cohort.judged and bool(structure(cohort.layout).pairs)


def _refuse_judged_factors(cohort: Cohort) -> None:
    # Trimmed rules ask for 2f+1 of those that are left; a median has no such condition.
    if _judged_factors(cohort):
        raise CohortError(
            "Expected updates whose LoRA factors nothing has judged for median, got some that "
            "passed by their products B A, whatever the scale of A and B, which it takes apart: "
            "liars may be most of them; use geometric-median, or trimmed-mean where sites were "
            "only chosen, or leave out the stage that judges (strategy.pre)."
        )


def _refuse_mixed_factors(cohort: Cohort, rule: str) -> None:
    if _judged_factors(cohort) and bool(((cohort.matrix_NS != 0).sum(1) > 1).any()):
        raise CohortError(
            f"Expected updates of single sites for {rule} with LoRA factors, got mixes of several, "
            "in which products B A were judged and A and B are added up apart: a liar's "
            "(k A, B / k) enters many of them; use geometric-median, multi-krum or lora-svd, or "
            "leave out the stage that mixes (strategy.pre)."
        )


def _read(cohort: Cohort) -> tuple[Sequence[Tensor], NDArray[np.float64] | None]:
    """Rows of the source that the cohort is made of, and how they are mixed; None: as they are."""
    matrix_NS, rows = cohort.matrix_NS, cohort.source.rows
    used = matrix_NS.any(0).nonzero().flatten().tolist() or [0]
    mix_NS = matrix_NS[:, used]
    same = mix_NS.shape[0] == len(used) and torch.equal(mix_NS, torch.eye(len(used)).double())
    return LazyRows(len(used), lambda i: rows[used[i]]), None if same else mix_NS.numpy()


def _blocks(
    pieces: list[Array], mix_NS: NDArray[np.float64] | None
) -> Iterator[tuple[int, Array, Array]]:
    """Start and values (N, C) of one block after the other, and scratch of N * C elements."""
    size = len(pieces[0])
    count = len(pieces) if mix_NS is None else len(mix_NS)
    # An odd number of cache lines: rows that are a power of two apart compete for the same few
    # places of a cache, which makes transposing them five times slower.
    width = min((max(_BLOCK // count, _CALL) // 16 | 1) * 16, size)
    read, values, scratch = (np.empty(n * width, np.float32) for n in (len(pieces), count, count))
    for at in range(0, size, width):
        block = [piece[at : at + width] for piece in pieces]
        flat = read[: len(block) * len(block[0])]
        np.concatenate(block, out=flat)
        if mix_NS is not None:
            mixed = mix_NS @ flat.reshape(len(block), -1).astype(np.float64)
            flat = values[: mixed.size]
            np.copyto(flat, mixed.reshape(-1), casting="same_kind")
        # Added to zero, -0 becomes +0, so that equal values have equal bits.
        np.add(flat, np.float32(0.0), out=flat)
        yield at, flat.reshape(count, -1), scratch[: len(flat)]


def _by_column(values_NC: Array, scratch: Array) -> Array:
    """Each coordinate sorted on its own: numpy's vectorised sort wants its values side by side."""
    columns_CN = scratch.reshape(-1, len(values_NC))
    np.copyto(columns_CN, values_NC.T)
    columns_CN.sort(axis=1)
    return columns_CN.T


def _by_network(values_NC: Array, scratch: Array) -> Array:
    """All coordinates sorted together: a sorting network of minima and maxima of whole rows."""
    rows, free = list(values_NC), scratch[: values_NC.shape[1]]
    for a, b in _network(len(rows)):
        np.minimum(rows[a], rows[b], out=free)
        np.maximum(rows[a], rows[b], out=rows[b])
        rows[a], free = free, rows[a]
    return np.stack(rows)


@lru_cache(maxsize=64)
def _network(count: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort (Knuth, vol. 3, Algorithm 5.2.2M): pairs to put in order."""
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while d > 0:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return tuple(pairs)
