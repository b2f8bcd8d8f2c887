"""What LoRA rules add to the frozen weights, as named tensors that accumulate over rounds.

Shape suffixes as in `product`: K columns of factors, I inputs and O outputs of a module. A module
has the factors `<module>.lora_fold_B.weight` (O, K) and `<module>.lora_fold_A.weight` (K, I), or,
once these would be larger, the matrix `<module>.lora_fold.weight` (O, I). Products are without
LoRA's scale alpha / rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from models.layout import FOLD, FOLD_A, FOLD_B


def accumulated(
    fold: Mapping[str, Tensor], increment: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The sum of a fold and of the factors (left (O, K), right (K, I)) that a round adds to it.

    Factors are put side by side, so that nothing is rounded: directions of several rounds are
    independent, and where they no longer fit into fewer than O I numbers the module becomes a
    matrix, summed in float64. Only columns that multiply to zero are dropped.
    """
    modules = sorted({*increment, *(module for module, _ in _parts(fold))})
    total: dict[str, Tensor] = {}
    for module in modules:
        dense = fold.get(module + FOLD)
        sides = [increment[module]] if module in increment else []
        if module + FOLD_A in fold:
            sides.insert(0, (fold[module + FOLD_B], fold[module + FOLD_A]))
        if not sides:
            assert dense is not None
            total[module + FOLD] = dense
            continue
        left, right = (
            torch.cat(side, dim=at) for side, at in ((_at(sides, 0), 1), (_at(sides, 1), 0))
        )
        kept = left.any(0) & right.any(1)
        left, right = left[:, kept], right[kept]
        if dense is not None or left.numel() + right.numel() > len(left) * right.shape[1]:
            product = left.double() @ right.double()
            matrix = product if dense is None else product + dense.double()
            total[module + FOLD] = matrix.float()
        elif left.shape[1]:
            total[module + FOLD_A], total[module + FOLD_B] = right.contiguous(), left.contiguous()
    return total


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Named tensors as (payload, fold), each in the order in which it came."""
    folded = {name for _, name in _parts(tensors)}
    payload = {name: tensor for name, tensor in tensors.items() if name not in folded}
    return payload, {name: tensor for name, tensor in tensors.items() if name in folded}


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of tensors on the wire, in bytes without names and shapes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _at(sides: list[tuple[Tensor, Tensor]], index: int) -> list[Tensor]:
    return [side[index] for side in sides]


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(module, name) of every tensor that belongs to a fold."""
    for name in tensors:
        for ending in (FOLD_A, FOLD_B, FOLD):
            if name.endswith(ending):
                yield name.removesuffix(ending), name
