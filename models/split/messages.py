"""What is said across the cut: a kind, the micro-batch, and hidden states or gradients."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from models.split import wire
from models.wire import WireError

_HEAD = struct.Struct("<BQII")  # kind, key, rows and columns of the mask


class Kind(IntEnum):
    """A question of the site, or the server's answer to it."""

    FORWARD = 1
    BACKWARD = 2
    STEP = 3
    HIDDEN = 4
    GRADIENT = 5
    STEPPED = 6
    SCORE = 7
    SCORED = 8
    GENERATE = 10
    GENERATED = 11
    OPEN = 12
    OPENED = 13


_MASKED = (Kind.FORWARD, Kind.SCORE)
_GRADIENTS = (Kind.BACKWARD, Kind.GRADIENT)
_BARE = (Kind.STEP, Kind.STEPPED, Kind.OPEN, Kind.OPENED)


@dataclass(frozen=True, eq=False)
class Message:
    """`values` (batch, tokens, hidden) go with all but steps and OPEN, `mask` with FORWARD, SCORE.

    `key` is the micro-batch; of GENERATE the position of its first token, of OPEN the model.
    """

    kind: Kind
    key: int
    values: Tensor | None = None
    mask: Tensor | None = None

    def encode(self, precision: str, generator: torch.Generator | None = None) -> bytes:
        """As bytes, with the values in one of `wire.KINDS`; gradients rounded without bias.

        That is for whole numbers, and where a `generator` is given.
        """
        rows, columns = self.mask.shape if self.mask is not None else (0, 0)
        parts = [_HEAD.pack(self.kind, self.key, rows, columns)]
        if self.mask is not None:
            parts.append(_packed(self.mask))
        if self.values is not None:
            drawn = generator if self.kind in _GRADIENTS else None
            parts.append(wire.pack(self.values.cpu(), precision, drawn))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes, *, most_tokens: int, hidden_size: int) -> Message:
        """The message in these bytes; raises WireError for what is none, or too large."""
        if len(data) < _HEAD.size:
            raise WireError(f"Expected a message of at least {_HEAD.size} bytes, got {len(data)}.")
        number, key, rows, columns = _HEAD.unpack_from(data)
        if number not in list(Kind):
            known = ", ".join(str(int(kind)) for kind in Kind)
            raise WireError(
                f"Expected a kind of message among {known}, got {number}; use the same version at "
                "both ends."
            )
        kind, body = Kind(number), data[_HEAD.size :]
        mask = None
        if kind in _MASKED:
            size = -(-rows * columns // 8)
            if not 0 < rows * columns <= most_tokens or len(body) < size:
                raise WireError(
                    f"Expected a mask of up to {most_tokens} tokens, got {rows} x {columns} in "
                    f"{len(body)} bytes."
                )
            mask, body = _unpacked(body[:size], rows, columns), body[size:]
        elif rows or columns:
            raise WireError(f"Expected no mask with {kind.name}, got {rows} x {columns}.")
        if kind in _BARE:
            if body:
                raise WireError(f"Expected nothing more in {kind.name}, got {len(body)} bytes.")
            return cls(kind, key)
        values = wire.unpack(body, most_tokens=most_tokens, hidden_size=hidden_size)
        if mask is not None and mask.shape != values.shape[:2]:
            raise WireError(
                f"Expected a mask for {tuple(values.shape[:2])}, got {tuple(mask.shape)}."
            )
        return cls(kind, key, values, mask)


def _packed(mask: Tensor) -> bytes:
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    weights = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8)
    return (bits.view(-1, 8) * weights).sum(1).to(torch.uint8).numpy().tobytes()


def _unpacked(octets: bytes, rows: int, columns: int) -> Tensor:
    found = torch.frombuffer(bytearray(octets), dtype=torch.uint8)
    bits = (found[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: rows * columns].view(rows, columns).long()
