"""LoRA's factors at a site: one of them held still, or only their first components in use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from models.payload import Payload
from models.personal import FACTORS


def side(name: str) -> str:
    """`A` or `B` for a tensor that is a factor by its name, else nothing."""
    parts = set(name.split("."))
    return next((word[-1] for word, parts_of in FACTORS.items() if parts & set(parts_of)), "")


@contextmanager
def held(payload: Payload, factor: str) -> Iterator[None]:
    """Keep one factor, `A` or `B`, out of the training within the block; empty: none."""
    frozen = [p for name, p in payload.parameters.items() if factor and side(name) == factor]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def leading(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors with zeros in place of all but the first `rank` components of LoRA's factors.

    Components that are zero in A and in B have zero gradients and stay zero, so that training goes
    as with LoRA of that rank, at the scale alpha / rank of the whole payload.
    """
    cut: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        at = {"A": 0, "B": 1}.get(side(name))
        cut[name] = tensor
        if at is not None and tensor.dim() > 1 and tensor.shape[at] > rank:
            cut[name] = tensor.clone()
            cut[name].narrow(at, rank, tensor.shape[at] - rank).zero_()
    return cut
