"""Aggregation as pure functions on a cohort of updates, and their composition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from models.layout import Layout
from strategies import fold, together
from strategies.cohort import Cohort, CohortError, norm
from strategies.product import structure
from strategies.registry import compose, split_names

__all__ = ["aggregate"]

T = TypeVar("T")


def aggregate(
    rule: str,
    base: Mapping[str, Tensor],
    deltas: Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    *,
    pre: str | Sequence[str] = (),
    server_optimizer: str = "none",
    seed: int = 0,
    trusted: Mapping[str, Tensor] | None = None,
    lora_scale: float = 1.0,
    **options: object,
) -> dict[str, Tensor]:
    """One aggregation without Flower: base plus the aggregated delta, as new named tensors.

    `base` maps names to tensors of one dtype; each delta holds the same names and shapes. Deltas
    and weights are sequences, or mappings by site name; no weights means the same for all.
    `options` are those of the stages: `clip_norm=1.0` with `pre="clip"`, `server_learning_rate=0.1`
    with `server_optimizer="adam"`. `trusted` is the server's own update for `fltrust`; `lora_scale`
    is LoRA's alpha / rank, by which products of factors are weighed against other tensors.

    Rules that change frozen weights too (`lora-exact`, `lora-stack`) also return what is to be
    added to the weight of each LoRA module, times alpha / rank: the product of
    `<module>.lora_fold_B.weight` (O, K) and `<module>.lora_fold_A.weight` (K, I), or, where it is
    smaller, the matrix `<module>.lora_fold.weight` (O, I). Such tensors in `base` are added up.
    `models.fold.load` puts all of it into a model.

    Raises ConfigError for an unknown rule, stage or option and for stages that do not fit each
    other or the payload, LayoutError or CohortError for deltas
    or weights that do not fit or are not finite.
    """
    names = split_names(pre) if isinstance(pre, str) else tuple(pre)
    stage = compose(rule, names, server_optimizer, options)
    base, folded = fold.split(base)
    layout = Layout.of(base)
    if structure(layout).pairs:
        together.check_factors(rule, names, server_optimizer)
    # Arithmetic is float32 whatever the base is kept in.
    wide = Layout(layout.names, layout.shapes)
    rows = {site: _row(site, delta, wide) for site, delta in _by_site(deltas).items()}
    shares = None if weights is None else _by_site(weights)
    base_D = wide.flatten({name: tensor.float() for name, tensor in base.items()})
    trusted_D = None if trusted is None else _row("trusted", trusted, wide)
    cohort = replace(
        Cohort.of(wide, base_D, rows, shares), trusted_D=trusted_D, lora_scale=lora_scale
    )
    generator = torch.Generator().manual_seed(seed)
    delta, _ = stage.apply(stage.init(wide.size), cohort, generator)
    return layout.unflatten(base_D + delta.vector_D) | fold.accumulated(folded, delta.fold)


def _by_site(values: Sequence[T] | Mapping[str, T]) -> dict[str, T]:
    if isinstance(values, Mapping):
        return dict(values)
    # Padded, so that sorting by name keeps the order in which they were given.
    return {f"{index:08d}": value for index, value in enumerate(values)}


def _row(site: str, delta: Mapping[str, Tensor], layout: Layout) -> Tensor:
    known = [name for name in layout.names if name in delta]
    ordered = [*known, *(name for name in delta if name not in layout.names)]
    row = layout.flatten({name: delta[name].float() for name in ordered})
    if not math.isfinite(norm(row)):
        raise CohortError(f"Expected finite numbers from {site!r}, got NaN or Inf.")
    return row
