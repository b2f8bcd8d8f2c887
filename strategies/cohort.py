"""The updates of one round, in one order, and what a rule makes of them.

Shape suffixes: N sites, D parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from models.layout import Layout
from strategies.mixing import chosen, mixed_bound, weighted_sum

# Below torch's grain size of 32768 a reduction is never split over threads, so that a norm has the
# same bits on every machine, whatever its number of cores.
_SERIAL = 16384


class CohortError(ValueError):
    """Updates that do not make a cohort: none, of different shapes, or with impossible weights."""


class LazyRows(Sequence[Tensor]):
    """Rows made one at a time, when asked for: `count` of them, row i being `make(i)`."""

    def __init__(self, count: int, make: Callable[[int], Tensor]) -> None:
        """Keep the recipe; nothing is computed yet."""
        self._count = count
        self._make = make

    def __len__(self) -> int:
        """Number of rows."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """Make row `index`, or a list of rows for a slice; raises IndexError beyond the end."""
        chosen = range(self._count)[index]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(i) for i in chosen]


@dataclass(frozen=True, eq=False)
class Cohort:
    """The admitted updates of a round, sorted by site name whatever order they came in.

    `rows` holds N deltas of shape (D,), float32. They may be memory-mapped or made on demand and
    are not stacked, so that a rule that needs one at a time stays within the memory of one.
    `weights_N` is float32 with sum 1. `clip` is an L2 bound that is proved to hold for each row.
    `lora_scale` is LoRA's alpha / rank, which weighs products of factors against other tensors;
    `trusted_D` is the server's own update on data that it trusts, for rules that compare with it;
    `left_out` says of sites that a stage has left out why; `caught` is how many sites the gate has
    quarantined, which are liars no longer among the rows.
    `judged` is whether a stage has judged these rows, by the products of LoRA factors: what adds
    them up must then add up products, since (k A, B / k) was judged like (A, B).
    """

    base_D: Tensor
    rows: Sequence[Tensor]
    weights_N: Tensor
    names: tuple[str, ...]
    layout: Layout
    clip: float | None = None
    lora_scale: float = 1.0
    trusted_D: Tensor | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    caught: int = 0
    judged: bool = False
    # What was computed of these rows once, by name. Another set of rows starts an empty one.
    memo: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Sort by name; raises CohortError for an inconsistent cohort."""
        count = len(self.names)
        if len(set(self.names)) != count:
            raise CohortError(f"Expected distinct site names, got {sorted(self.names)}.")
        if len(self.rows) != count or tuple(self.weights_N.shape) != (count,):
            raise CohortError(
                f"Expected {count} rows and weights, got {len(self.rows)} and "
                f"{tuple(self.weights_N.shape)}."
            )
        if tuple(self.base_D.shape) != (self.layout.size,):
            raise CohortError(
                f"Expected a base of {self.layout.size} parameters, got {tuple(self.base_D.shape)}."
            )
        order = sorted(range(count), key=self.names.__getitem__)
        if order != list(range(count)):
            object.__setattr__(self, "rows", _reordered(self.rows, order))
            object.__setattr__(self, "weights_N", self.weights_N[order])
            object.__setattr__(self, "names", tuple(self.names[i] for i in order))

    @classmethod
    def of(
        cls,
        layout: Layout,
        base_D: Tensor,
        deltas: Mapping[str, Tensor],
        weights: Mapping[str, float] | None = None,
    ) -> Cohort:
        """Cohort of site name -> delta (D,) and site name -> positive weight (None: all the same).

        `deltas` is read again whenever a row is used, so a `Spool` stays on disk.
        Raises CohortError.
        """
        names = tuple(sorted(deltas))
        if not names:
            raise CohortError("Expected at least one update, got none.")
        for name in names:
            row = deltas[name]
            if tuple(row.shape) != (layout.size,) or row.dtype != torch.float32:
                raise CohortError(
                    f"Expected a float32 delta of {layout.size} parameters from {name!r}, got "
                    f"{row.dtype} of shape {tuple(row.shape)}."
                )
        rows = LazyRows(len(names), lambda i: deltas[names[i]])
        return cls(base_D, rows, _shares(names, weights), names, layout)

    @classmethod
    def nobody(cls, layout: Layout, base_D: Tensor) -> Cohort:
        """A round without updates, for rules with fixed weights, to which it is one of zeros."""
        return cls(base_D, (), torch.zeros(0), (), layout)

    @cached_property
    def deltas_ND(self) -> Tensor:
        """All rows stacked, shape (N, D): for rules that must see the updates together."""
        return torch.stack(list(self.rows))

    @property
    def source(self) -> Cohort:
        """The cohort whose rows this one's are linear combinations of; itself where not mixed."""
        return self.rows.source if isinstance(self.rows, MixedRows) else self

    @property
    def matrix_NS(self) -> Tensor:
        """Coefficients, float64, of these rows over the S rows of `source`."""
        if isinstance(self.rows, MixedRows):
            return self.rows.matrix_MN
        return torch.eye(len(self.names), dtype=torch.float64)

    @property
    def coefficients_S(self) -> Tensor:
        """Coefficients, float64, of the weighted sum of these rows over the rows of `source`."""
        return self.weights_N.double() @ self.matrix_NS

    def mixed(
        self,
        mix_MN: Tensor,
        names: Sequence[str] | None = None,
        weights_M: Tensor | None = None,
        *,
        judged: bool = False,
    ) -> Cohort:
        """Cohort whose row m is the sum over n of mix_MN[m, n] * row n, made when it is asked for.

        Names and weights are this cohort's own unless given; `judged` says that products decided
        about them. Mixing a mixed cohort multiplies the
        matrices (float64), so that a chain of linear stages reads the rows of `source` once.
        With LoRA factors a row, once made, adds up A and B apart; rules that judge or combine
        products read `source` and the matrix instead. Raises CohortError for wrong shapes.
        """
        if mix_MN.ndim != 2 or mix_MN.shape[1] != len(self.names):
            raise CohortError(
                f"Expected a mix over {len(self.names)} rows, got shape {tuple(mix_MN.shape)}."
            )
        mix_MN = mix_MN.double()
        return replace(
            self,
            rows=MixedRows(self.source, mix_MN @ self.matrix_NS),
            names=self.names if names is None else tuple(names),
            weights_N=self.weights_N if weights_M is None else weights_M.float(),
            clip=mixed_bound(self.clip, mix_MN),
            judged=self.judged or judged,
        )


class MixedRows(LazyRows):
    """Linear combinations of the rows of `source`, with coefficients `matrix_MN` (float64)."""

    def __init__(self, source: Cohort, matrix_MN: Tensor) -> None:
        """Keep the matrix; a row is added up when it is asked for."""
        super().__init__(len(matrix_MN), self._sum)
        self.source = source
        self.matrix_MN = matrix_MN

    def _sum(self, index: int) -> Tensor:
        coefficients_N = self.matrix_MN[index]
        rows = self.source.rows
        if (only := chosen(coefficients_N)) is not None:
            return rows[only]
        return weighted_sum(rows, coefficients_N.tolist(), self.source.layout.size)


def _reordered(rows: Sequence[Tensor], order: Sequence[int]) -> LazyRows:
    if isinstance(rows, MixedRows):
        return MixedRows(rows.source, rows.matrix_MN[list(order)])
    return LazyRows(len(order), lambda i: rows[order[i]])


@dataclass(frozen=True, eq=False)
class Delta:
    """What is added to the base: `vector_D` of shape (D,), float32, laid out as `layout`.

    `fold` maps a LoRA module to the factors (left (O, K), right (K, I)) of what is added to its
    frozen weight, in units of products, which is before LoRA's scale alpha / rank. `left_out` maps
    sites whose updates a stage has left out to the reason.
    """

    vector_D: Tensor
    layout: Layout
    fold: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def added_to(self, base_D: Tensor) -> dict[str, Tensor]:
        """The new payload: base (D,) plus this delta, as named tensors of the layout's dtype."""
        return self.layout.unflatten(base_D + self.vector_D)


class Spool(Mapping[str, Tensor]):
    """Deltas waiting on disk for the end of the round: site name -> memory-mapped (D,) float32.

    Every look-up maps the file afresh, so memory does not grow with the number of sites.
    Use as a context manager, or call `clear`, to remove the files.
    """

    def __init__(self, folder: Path) -> None:
        """Use `folder` (made when missing), emptied of what an interrupted round left there."""
        self._folder = folder
        self._files: dict[str, tuple[Path, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.f32"):
            left.unlink()

    def put(self, site: str, delta_D: Tensor) -> None:
        """Write a delta of shape (D,); raises OSError (disk full), CohortError (a second one)."""
        if site in self._files:
            raise CohortError(f"Expected one delta from {site!r}, got a second one.")
        # A site's name is not a safe file name, so files are numbered.
        path = self._folder / f"{len(self._files):06d}.f32"
        vector = delta_D.detach().float().contiguous()
        try:
            # Through write(), because a full disk under a writable memory map kills the process.
            path.write_bytes(vector.numpy().data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._files[site] = (path, vector.numel())

    def __getitem__(self, site: str) -> Tensor:
        """The delta of `site`, mapped privately: changing it does not change the file."""
        path, size = self._files[site]
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.float32)

    def __iter__(self) -> Iterator[str]:
        """Site names, in the order in which they came."""
        return iter(self._files)

    def __len__(self) -> int:
        """Number of deltas."""
        return len(self._files)

    def clear(self) -> None:
        """Remove the files; deltas still mapped stay readable."""
        for path, _ in self._files.values():
            path.unlink(missing_ok=True)
        self._files.clear()

    def __enter__(self) -> Spool:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Clear."""
        self.clear()


def norm(vector_D: Tensor) -> float:
    """L2 norm in float64, the same bits for any number of threads; NaN or inf if an element is."""
    vector = vector_D.detach()
    squares = [
        float(vector[start : start + _SERIAL].double().square().sum())
        for start in range(0, len(vector), _SERIAL)
    ]
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan


def _shares(names: Sequence[str], weights: Mapping[str, float] | None) -> Tensor:
    if weights is None:
        weights = dict.fromkeys(names, 1)
    if set(weights) != set(names):
        odd = sorted(set(weights) ^ set(names))
        raise CohortError(f"Expected one weight for each site, got a mismatch at {odd[0]!r}.")
    for name in names:
        if not (math.isfinite(weights[name]) and weights[name] > 0):
            raise CohortError(f"Expected a positive weight for {name!r}, got {weights[name]}.")
    # Exact arithmetic: the shares do not depend on the order in which they are added up.
    exact = [Fraction(weights[name]) for name in names]
    total = sum(exact)
    return torch.tensor([float(share / total) for share in exact], dtype=torch.float32)
