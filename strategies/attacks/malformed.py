"""Replies that are not what was asked for: one attack per class of fault that the gate refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

import torch

from models.layout import Layout
from models.wire import DTYPES, RawArray, encode
from strategies.gate import MAX_EXAMPLES, RefusalKind


@dataclass(frozen=True)
class Sent:
    """What a site's reply holds, as the gate looks at it; `copies` times over."""

    arrays: Mapping[str, RawArray]
    round: object
    layout_digest: object
    num_examples: object
    copies: int = 1


Spoil: TypeAlias = Callable[[Sent, Layout], Sent]


@dataclass(frozen=True)
class Fault:
    """A way to spoil a reply, and the kind of refusal that it must meet."""

    spoil: Spoil
    kind: RefusalKind


def inflated(sent: Sent, layout: Layout) -> Sent:
    """Claim the most examples that the gate lets through (weight inflation)."""
    return replace(sent, num_examples=MAX_EXAMPLES)


def _last(change: Callable[[RawArray], RawArray]) -> Spoil:
    def spoil(sent: Sent, layout: Layout) -> Sent:
        name = layout.names[-1]
        return replace(sent, arrays={**sent.arrays, name: change(sent.arrays[name])})

    return spoil


def _filled(value: float) -> Spoil:
    def change(raw: RawArray) -> RawArray:
        dtype = DTYPES[raw.dtype]
        # Infinite and NaN stay what they are; what is finite stays so in every dtype.
        most = torch.finfo(dtype).max / 2 if math.isfinite(value) else value
        return encode(torch.full(raw.shape, min(value, most), dtype=dtype))

    return _last(change)


def _missing(sent: Sent, layout: Layout) -> Sent:
    return replace(sent, arrays={name: sent.arrays[name] for name in layout.names[:-1]})


def _extra(sent: Sent, layout: Layout) -> Sent:
    return replace(sent, arrays={**sent.arrays, "luggage": encode(torch.zeros(1))})


def _reordered(sent: Sent, layout: Layout) -> Sent:
    return replace(sent, arrays={name: sent.arrays[name] for name in reversed(layout.names)})


def _oversized(sent: Sent, layout: Layout) -> Sent:
    ballast = bytes(layout.size * layout.torch_dtype.itemsize + (1 << 20))
    return _last(lambda raw: replace(raw, data=raw.data + ballast))(sent, layout)


def _other_dtype(raw: RawArray) -> RawArray:
    return replace(raw, dtype="float16" if raw.dtype != "float16" else "float32")


def _one_value(raw: RawArray) -> RawArray:
    # (1,) would broadcast over any shape; a single value of shape (1,) becomes a scalar.
    shape = (1,) if tuple(raw.shape) != (1,) else ()
    return RawArray(raw.dtype, shape, raw.data[: DTYPES[raw.dtype].itemsize])


def _examples(value: object) -> Spoil:
    return lambda sent, layout: replace(sent, num_examples=value)


FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "missing-key": Fault(_missing, "missing-key"),
        "extra-key": Fault(_extra, "extra-key"),
        "reordered-keys": Fault(_reordered, "reordered-keys"),
        "wrong-dtype": Fault(_last(_other_dtype), "wrong-dtype"),
        "wrong-shape": Fault(_last(lambda raw: replace(raw, shape=(*raw.shape, 1))), "wrong-shape"),
        "broadcast-shape": Fault(_last(_one_value), "wrong-shape"),
        "malformed-bytes": Fault(
            _last(lambda raw: replace(raw, data=raw.data[:-1])), "malformed-bytes"
        ),
        "oversized": Fault(_oversized, "oversized"),
        "wrong-round": Fault(
            lambda sent, layout: replace(sent, round=int(str(sent.round)) - 1), "wrong-round"
        ),
        "duplicate": Fault(lambda sent, layout: replace(sent, copies=2), "duplicate"),
        "wrong-layout": Fault(lambda sent, layout: replace(sent, layout_digest="0" * 64), "layout"),
        "zero-examples": Fault(_examples(0), "num-examples"),
        "negative-examples": Fault(_examples(-1), "num-examples"),
        "nan-examples": Fault(_examples(math.nan), "num-examples"),
        "huge-examples": Fault(_examples(10**15), "num-examples"),
        "nan": Fault(_filled(math.nan), "not-finite"),
        "inf": Fault(_filled(math.inf), "not-finite"),
        "absurd-norm": Fault(_filled(1e30), "norm"),
    }
)
"""Attack name to fault. `unasked` is missing: only who was asked is given the run's adversary."""
