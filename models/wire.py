"""Tensors as they travel: raw little-endian bytes with a dtype and a shape, never a pickle."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)


class WireError(ValueError):
    """An array that cannot travel, or bytes that are not the array they claim to be."""


@dataclass(frozen=True)
class RawArray:
    """One tensor on the wire: dtype name, shape, and its elements as little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode(tensor: Tensor) -> RawArray:
    """Turn a tensor of any shape into bytes; raises WireError for a dtype that does not travel."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise WireError(f"Expected a tensor of dtype {_choices()}, got {name}; convert it first.")
    # numpy has no bfloat16, so every dtype leaves as plain bytes.
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return RawArray(name, tuple(tensor.shape), _little(octets, tensor.element_size()))


def decode(raw: RawArray) -> Tensor:
    """Turn bytes back into a fresh, writable CPU tensor; raises WireError when they do not fit."""
    if raw.dtype not in DTYPES:
        raise WireError(f"Expected dtype {_choices()}, got {raw.dtype!r:.80}.")
    if any(type(side) is not int or side < 0 for side in raw.shape):
        raise WireError(f"Expected a shape of whole numbers from 0, got {raw.shape!r:.80}.")
    dtype = DTYPES[raw.dtype]
    expected = prod(raw.shape) * dtype.itemsize
    if not isinstance(raw.data, bytes) or len(raw.data) != expected:
        got = f"{len(raw.data)} bytes" if isinstance(raw.data, bytes) else type(raw.data).__name__
        raise WireError(f"Expected {expected} bytes for {raw.dtype} of {raw.shape}, got {got}.")
    if not raw.data:
        return torch.empty(raw.shape, dtype=dtype)
    octets = torch.frombuffer(bytearray(raw.data), dtype=torch.uint8)
    if sys.byteorder == "big":
        octets = octets.view(-1, dtype.itemsize).flip(1).reshape(-1)
    return octets.view(dtype).reshape(raw.shape)


def _little(octets: Tensor, itemsize: int) -> bytes:
    if sys.byteorder == "big":
        octets = octets.view(-1, itemsize).flip(1).reshape(-1)
    return octets.numpy().tobytes()


def _choices() -> str:
    return ", ".join(sorted(DTYPES))
