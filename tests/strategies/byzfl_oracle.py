"""byzfl's aggregators as an independent second opinion, in float64; skips where byzfl is missing.

from tests.strategies.byzfl_oracle import oracle
expected_D = oracle("TrMean", rows_ND, f=2)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from flower_app.bench.byzfl_loader import ByzflMissing, load_byzfl


@cache
def aggregators() -> Any:
    """The module `byzfl.aggregators`; skips the test that asks where it is missing."""
    try:
        return load_byzfl()
    except ByzflMissing as error:
        pytest.skip(str(error))


def oracle(name: str, rows_ND: Tensor, **options: object) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What byzfl's aggregator (shape (D,)) or pre-aggregator (shape (M, D)) makes of the rows."""
    result = getattr(aggregators(), name)(**options)(rows_ND.double().numpy())
    return np.asarray(result, dtype=np.float64)
