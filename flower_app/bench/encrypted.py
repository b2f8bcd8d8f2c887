"""Secure aggregation by homomorphic encryption: seconds and bytes per site against a plain round.

All sites encrypt, a twentieth of them drops out before sending, one opens the sum. In one process
of one thread, whose CPU time counts; bytes are those of all values that the messages hold, without
Flower's framing of them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from flower_app.bench.output import table
from privacy.secure import ckks
from privacy.secure.ckks_keys import made
from privacy.secure.encrypted import advertise
from privacy.secure.intake import proposed
from privacy.secure.terms import Terms
from strategies.exchange import Parcel, nbytes

_WEIGHT, _SCALE = 100, 128
T = TypeVar("T")


def measured(terms: Terms, reach: float) -> dict[str, Any]:
    """One sum; raises AssertionError where it is not that of the updates."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(step: str, work: Callable[..., T], *arguments: object) -> T:
        started = time.process_time()
        result = work(*arguments)
        seconds[step] += time.process_time() - started
        return result

    key, total, numbers, size = made(), ckks.Total(terms), terms.numbers, terms.size
    update = 0.01 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    names = sorted(set(terms.members) - set(terms.members[::20]))
    up = 0
    for name in names:
        words, _ = timed("encode", numbers.encode, update.numpy(), _WEIGHT, _SCALE)
        data = timed("encrypt", ckks.encrypt, key, terms, name, words)
        timed("server", total.add, data)
        up = len(data)
    data = timed("server", total.dump)
    opened = numbers.pack(timed("open", ckks.decrypt, key, terms, names, data))
    mean_D, _ = numbers.decode(numbers.unpack(opened, numbers.length(size)), _SCALE)
    cut = update.clamp(-reach, reach).numpy()
    assert float(np.abs(mean_D - cut).max()) <= 2 * numbers.step, "the sum is not of the updates"
    plain, sites, told = 8 * size, len(names), proposed(terms)
    # What each site is sent and sends before, and what passes the one that opens the sum.
    alone: list[Parcel] = [told, advertise(_WEIGHT, key), {**told, "scale": _SCALE}]
    shared: list[Parcel] = [{**told, "active": names, "sum": data}, {"numbers": opened}]
    secure = 4 * size + up + sum(map(nbytes, alone)) + sum(map(nbytes, shared)) / sites
    return {
        "sites": len(terms.members),
        "size": size,
        "bytes_plain": plain,
        "bytes_secure": secure,
        "overhead": secure / plain,
        "encode_s": seconds["encode"] / sites,
        "encrypt_s": seconds["encrypt"] / sites,
        "server_s": seconds["server"],
        "open_s": seconds["open"],
    }


def text(records: list[dict[str, Any]]) -> str:
    """The records as a table."""
    columns = (
        "bits", "MB plain", "MB CKKS", "ratio", "encode ms", "encrypt ms", "server s", "open ms",
    )  # fmt: skip
    rows = [
        [
            str(r["bits"]),
            f"{r['bytes_plain'] / 1e6:.2f}",
            f"{r['bytes_secure'] / 1e6:.2f}",
            f"{r['overhead']:.3f}",
            f"{1000 * r['encode_s']:.1f}",
            f"{1000 * r['encrypt_s']:.1f}",
            f"{r['server_s']:.1f}",
            f"{1000 * r['open_s']:.1f}",
        ]
        for r in records
    ]
    return "\n".join(
        [
            table(columns, rows),
            "",
            "The same sums by CKKS. MB: as above, with an equal part of what the one that opens\n"
            "the sum gets and sends (open: its work, once per sum).",
        ]
    )
