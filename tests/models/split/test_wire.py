"""Frames of hidden states: what comes back, how long they are, and what is refused."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.split.wire import KINDS, pack, token_bytes, unpack
from models.wire import WireError

HEADER = 16


def drawn(batch: int, tokens: int, hidden: int, seed: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, tokens, hidden, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), batch=st.integers(1, 3), tokens=st.integers(1, 5),
    hidden=st.integers(1, 33), seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 1.0, 300.0, 5e4]),
)  # fmt: skip
def test_what_comes_back_is_close(
    kind: str, batch: int, tokens: int, hidden: int, seed: int, scale: float
) -> None:
    values = drawn(batch, tokens, hidden, seed, scale)
    frame = pack(values, kind)
    assert len(frame) == HEADER + batch * tokens * token_bytes(kind, hidden)
    found = unpack(frame, most_tokens=batch * tokens, hidden_size=hidden).float()
    largest = values.abs().amax(-1, keepdim=True)
    # Half a level; scales round up by 2^-7 at most.
    half = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127, "int4": 0.5 / 7}[kind]
    allowed = half * largest * (1 + 2**-7)
    assert bool(((found - values).abs() <= allowed + 1e-30).all())
    assert pack(found, kind) == frame or not kind.startswith(("fp", "bf"))


@pytest.mark.parametrize(("kind", "share"), [("bf16", 1.02), ("int8", 0.52), ("int4", 0.27)])
def test_bytes_per_token_are_near_the_floor(kind: str, share: float) -> None:
    values = drawn(4, 32, 512, 0, 1.0)
    assert len(pack(values, kind)) / (4 * 32) <= share * 2 * 512


def test_extremes_keep_their_levels() -> None:
    values = torch.tensor([[[1.0, -1.0, 0.6, 0.0]]])
    found = unpack(pack(values, "int8"), most_tokens=1, hidden_size=4)
    assert found[0, 0, :2].tolist() == pytest.approx([1.0, -1.0], rel=0.5 / 127)
    assert found[0, 0, 3] == 0
    four = unpack(pack(values, "int4"), most_tokens=1, hidden_size=4)
    assert four[0, 0].tolist() == pytest.approx([1.0, -1.0, 4 / 7, 0.0], rel=2**-7)


def lying(*, kind: int = 1, batch: int = 1, tokens: int = 2, hidden: int = 4) -> bytes:
    return struct.pack("<2sBBIII", b"f2", kind, 0, batch, tokens, hidden) + bytes(16)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "a header of 16 bytes, got 0"),
        (lying()[:10], "a header of 16 bytes, got 10"),
        (b"g" + lying()[1:], "a frame of version 2"),
        (lying(kind=9), "a frame of version 2"),
        (lying()[:-1], "Expected 16 bytes of bf16 .*got 15"),
        (lying() + b"x", "Expected 16 bytes of bf16 .*got 17"),
        (lying(hidden=5), "tokens of 4 values, got 1 x 2 of 5"),
        (lying(batch=2**31, tokens=2**31), "up to 8 tokens"),
        (lying(batch=0), "up to 8 tokens of 4 values, got 0 x 2"),
        (lying(tokens=9), "up to 8 tokens"),
        (lying()[:16] + b"\x80\x7f" * 8, "finite hidden states, got NaN or Inf"),
    ],
)
def test_frames_that_lie_are_refused(frame: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        unpack(frame, most_tokens=8, hidden_size=4)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(WireError, match=r"\(batch, tokens, hidden\) as one of fp32.* as 'int2'"):
        pack(torch.zeros(1, 1, 1), "int2")
    with pytest.raises(WireError, match=r"got \(3,\)"):
        pack(torch.zeros(3), "bf16")
    with pytest.raises(WireError, match="finite hidden states to send"):
        pack(torch.full((1, 1, 2), torch.nan), "int8")
    with pytest.raises(WireError, match="within the range of bfloat16"):
        pack(torch.full((1, 1, 2), torch.finfo().max), "int8")
