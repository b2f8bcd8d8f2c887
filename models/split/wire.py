"""Hidden states and their gradients as bytes: floats, or whole numbers with a scale per token.

A frame is a header of 16 bytes, for whole numbers the scales (bfloat16), and the values. Nothing in
it is trusted: sizes are checked against what is there before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from models.split.rounding import rounded
from models.wire import RawArray, WireError, decode, encode

# Magic and version, kind, reserved, then batch, tokens and hidden size.
_HEADER = struct.Struct("<2sBBIII")
_MAGIC = b"f2"
_FLOATS: Mapping[str, str] = MappingProxyType({"fp32": "float32", "bf16": "bfloat16"})
_BITS: Mapping[str, int] = MappingProxyType({"int8": 8, "int4": 4})
KINDS = (*_FLOATS, *_BITS)


def pack(hidden: Tensor, kind: str, generator: torch.Generator | None = None) -> bytes:
    """A frame of hidden states (batch, tokens, hidden); raises WireError for one that cannot be.

    `int8` and `int4` round each token's values to the nearest of 255 or 15 levels, up to the
    largest of them (symmetric, per token), or without bias where a `generator` is given.
    """
    if hidden.dim() != 3 or kind not in KINDS:
        raise WireError(
            f"Expected (batch, tokens, hidden) as one of {', '.join(KINDS)}, got "
            f"{tuple(hidden.shape)} as {kind!r}."
        )
    header = _HEADER.pack(_MAGIC, KINDS.index(kind), 0, *hidden.shape)
    if kind in _FLOATS:
        return header + encode(hidden.to(getattr(torch, _FLOATS[kind]))).data
    levels, scales = rounded(hidden.detach().float(), _BITS[kind], generator)
    return header + encode(scales).data + _octets(levels, _BITS[kind])


def unpack(frame: bytes, *, most_tokens: int, hidden_size: int) -> Tensor:
    """Hidden states (batch, tokens, hidden), float32 (bf16 stays); raises WireError.

    For a frame of another version, kind or size, of more than `most_tokens` tokens, and of values
    that are not finite.
    """
    if len(frame) < _HEADER.size:
        raise WireError(f"Expected a header of {_HEADER.size} bytes, got {len(frame)}.")
    magic, kind_index, reserved, batch, tokens, hidden = _HEADER.unpack_from(frame)
    if magic != _MAGIC or kind_index >= len(KINDS) or reserved:
        raise WireError(f"Expected a frame of version 2, got {frame[:4]!r}; use the same version.")
    if hidden != hidden_size or not 0 < batch * tokens <= most_tokens:
        raise WireError(
            f"Expected up to {most_tokens} tokens of {hidden_size} values, got {batch} x {tokens} "
            f"of {hidden}."
        )
    kind, shape, body = KINDS[kind_index], (batch, tokens, hidden), frame[_HEADER.size :]
    expected = batch * tokens * token_bytes(kind, hidden)
    if len(body) != expected:
        raise WireError(f"Expected {expected} bytes of {kind} for {shape}, got {len(body)}.")
    if kind in _FLOATS:
        values = decode(RawArray(_FLOATS[kind], shape, body))
    else:
        scale_bytes = 2 * batch * tokens
        scales = decode(RawArray("bfloat16", (batch, tokens, 1), body[:scale_bytes]))
        values = _levels(body[scale_bytes:], shape, _BITS[kind]) * scales.float()
    if not bool(values.isfinite().all()):
        raise WireError("Expected finite hidden states, got NaN or Inf.")
    return values


def token_bytes(kind: str, hidden: int) -> int:
    """Bytes of one token in a frame, the header apart."""
    if kind in _FLOATS:
        return hidden * (4 if kind == "fp32" else 2)
    return 2 + -(-hidden * _BITS[kind] // 8)


def _octets(levels: Tensor, bits: int) -> bytes:
    if bits == 8:
        return levels.contiguous().view(torch.uint8).numpy().tobytes()
    # Two to a byte, each token padded to whole bytes.
    nibbles = torch.nn.functional.pad(levels, (0, levels.shape[-1] % 2)).view(torch.uint8) & 0xF
    return (nibbles[..., ::2] | (nibbles[..., 1::2] << 4)).numpy().tobytes()


def _levels(octets: bytes, shape: tuple[int, int, int], bits: int) -> Tensor:
    raw = torch.frombuffer(bytearray(octets), dtype=torch.uint8)
    if bits == 8:
        return raw.view(torch.int8).view(shape)
    raw = raw.view(*shape[:2], -1)
    nibbles = torch.stack([raw & 0xF, raw >> 4], dim=-1).flatten(-2)[..., : shape[2]].to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)
