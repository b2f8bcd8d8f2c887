"""Which rows are held out of training, decided by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from datasets import Dataset

from flower_app.data.source import check_columns


def contents(rows: Dataset, keys: Sequence[str]) -> list[str]:
    """The content of each row as one text: its cells in the columns `keys`, in their order."""
    check_columns(rows, keys, "the rows")
    columns = [rows[key][:] for key in keys]
    return [
        json.dumps(cells, ensure_ascii=False, default=str) for cells in zip(*columns, strict=True)
    ]


def split(
    rows: Dataset, fraction: float, seed: int, keys: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, by a seeded SHA-256 of each row's content.

    A row is held out when its hash, read as a number in [0, 1), is below `fraction`. So the same
    content is on the same side at every site, in every order and among any other rows, and no row
    is ever on both. Either side may come out empty where there are few rows.
    """
    train: list[int] = []
    held_out: list[int] = []
    threshold = int(fraction * 2**64)
    for index, content in enumerate(contents(rows, keys)):
        digest = hashlib.sha256(f"{seed}\n{content}".encode("utf-8", "surrogatepass")).digest()
        side = held_out if int.from_bytes(digest[:8], "big") < threshold else train
        side.append(index)
    return train, held_out
