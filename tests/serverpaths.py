"""Paths of the server as they are written between real sites: as variables of its own process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
KEYS = (
    "model.name", "data.source", "data.eval-source", "strategy.root-source", "run.output-dir",
    "run.resume",
)  # fmt: skip


def unnamed(flat: Mapping[str, T]) -> dict[str, T | str]:
    """The run config with a variable, set in this process, for every path of the server."""
    found: dict[str, T | str] = dict(flat)
    for key in KEYS:
        value = flat.get(key)
        if isinstance(value, str) and value.startswith("/"):
            name = "FLORILEGIUM_TEST_" + hashlib.sha256(value.encode()).hexdigest()[:16]
            os.environ[name] = value
            found[key] = f"${name}"
    return found
