"""Conditions on the number of sites and of those that may lie."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.cohort import CohortError

NumByzantine: TypeAlias = Annotated[int, Field(ge=0)]


def require(n: int, f: int, times: int, plus: int) -> int:
    """Check n >= times * f + plus rows for num_byzantine=f and return n; raises CohortError."""
    if n >= times * f + plus:
        return n
    needed = f"n ≥ {times if times > 1 else ''}f+{plus}"
    most = (n - plus) // times
    if most < 0:
        raise CohortError(
            f"Expected at least {plus} updates with strategy.num-byzantine={f}, got n={n} "
            f"({needed}); add sites or pick another rule."
        )
    raise CohortError(
        f"Expected strategy.num-byzantine={f} to be at most {most} (n={n} needs {needed}); lower "
        "it or add sites."
    )
