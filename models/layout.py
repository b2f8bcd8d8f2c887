"""Names, shapes and dtype of what travels, with a digest that both ends compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

# What is added to the frozen weight of a module: factors (O, K) and (K, I), or one (O, I) matrix.
FOLD_A, FOLD_B, FOLD = ".lora_fold_A.weight", ".lora_fold_B.weight", ".lora_fold.weight"

# Before the name of a payload's tensor: SCAFFOLD's control variate of that tensor.
CONTROL = "control/"


class LayoutError(ValueError):
    """Tensors that do not fit the layout they were held against."""


@dataclass(frozen=True)
class Layout:
    """Ordered tensor names with their shapes and one dtype; D is the number of elements."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "float32"

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Layout of named tensors of one dtype; raises LayoutError when empty or mixed."""
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
        if len(dtypes) != 1:
            raise LayoutError(
                f"Expected tensors of one dtype, got {sorted(dtypes) or 'no tensors'}."
            )
        shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
        return cls(tuple(tensors), shapes, dtypes.pop())

    @cached_property
    def size(self) -> int:
        """Number of elements, D."""
        return sum(prod(shape) for shape in self.shapes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and dtype, in order."""
        text = json.dumps([self.names, self.shapes, self.dtype])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise LayoutError at the first difference in names, their order, shapes or dtype."""
        if missing := [name for name in self.names if name not in tensors]:
            raise LayoutError(f"Expected tensor {missing[0]!r}, which is missing.")
        if extra := [name for name in tensors if name not in self.names]:
            raise LayoutError(f"Expected only the layout's tensors, got {extra[0]!r} too.")
        if tuple(tensors) != self.names:
            raise LayoutError("Expected the layout's order of tensors, got another one.")
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                raise LayoutError(f"Expected {name!r} of shape {shape}, got {tuple(tensor.shape)}.")
            if tensor.dtype != self.torch_dtype:
                raise LayoutError(f"Expected {name!r} as {self.dtype}, got {tensor.dtype}.")

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate checked tensors into one float32 vector of shape (D,)."""
        self.check(tensors)
        return torch.cat([tensors[name].detach().reshape(-1).float() for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a vector of shape (D,) into named tensors of the layout's dtype."""
        if tuple(vector.shape) != (self.size,):
            raise LayoutError(f"Expected a vector of {self.size}, got {tuple(vector.shape)}.")
        parts = torch.split(vector, [prod(shape) for shape in self.shapes])
        return {
            name: part.reshape(shape).to(self.torch_dtype)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }
