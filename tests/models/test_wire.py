"""Arrays on the wire: exact round trips, little-endian bytes, and refusal of what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.wire import DTYPES, RawArray, WireError, decode, encode

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(shape=shapes, dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 2**31))
def test_decode_undoes_encode_to_the_bit(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    raw = encode(tensor)
    back = decode(raw)
    assert (raw.dtype, raw.shape, type(raw.data)) == (dtype, shape, bytes)
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_bytes_are_little_endian() -> None:
    assert encode(torch.tensor([1.0])).data == bytes.fromhex("0000803f")
    assert encode(torch.tensor(-2.0, dtype=torch.bfloat16)).data == bytes.fromhex("00c0")
    assert encode(torch.tensor([1.0], dtype=torch.float16)).data == bytes.fromhex("003c")


def test_odd_values_keep_their_bits() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    assert torch.equal(decode(encode(tensor)).view(torch.int32), tensor.view(torch.int32))


def test_strided_and_trained_tensors_are_encoded() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_()
    assert torch.equal(decode(encode(tensor.T)), tensor.detach().T)


def test_decoded_tensor_is_writable_and_leaves_the_bytes_alone() -> None:
    raw = encode(torch.zeros(3))
    tensor = decode(raw)
    tensor.add_(1)
    assert tensor.sum() == 3 and raw.data == bytes(12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_encode_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(WireError, match=r"Expected a tensor of dtype bfloat16, float16, float32"):
        encode(torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (RawArray("float64", (1,), bytes(8)), r"Expected dtype .* got 'float64'"),
        (RawArray("__class__", (1,), bytes(4)), r"Expected dtype"),
        (RawArray("float32", (2,), bytes(7)), r"Expected 8 bytes .* got 7 bytes"),
        (RawArray("float32", (2,), bytes(9)), r"got 9 bytes"),
        (RawArray("float32", (), b""), r"Expected 4 bytes"),
        (RawArray("float32", (-1, -1), bytes(4)), r"whole numbers from 0"),
        (RawArray("float32", (True,), bytes(4)), r"whole numbers from 0"),
        (RawArray("float32", (10**30,), bytes(4)), r"got 4 bytes"),
        (RawArray("float32", (1,), "text"), r"got str"),  # type: ignore[arg-type]
        (RawArray("float32", (1.0,), bytes(4)), r"whole numbers"),  # type: ignore[arg-type]
    ],
)
def test_decode_refuses_what_does_not_fit(raw: RawArray, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(raw)
