"""Conditions on the number of sites and of those that may lie."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.cohort import CohortError

NumByzantine: TypeAlias = Annotated[int, Field(ge=0)]


def remaining(f: int, caught: int) -> int:
    """How many of f liars can be among the rows, where the replies of `caught` are out already."""
    return max(0, f - caught)


def require(n: int, f: int, times: int, plus: int, caught: int = 0) -> int:
    """Check that n rows are enough for num_byzantine=f and return n; raises CohortError.

    Of the f liars those `caught` sent none of the rows: n >= times * (f - caught) + plus.
    """
    if n >= times * remaining(f, caught) + plus:
        return n
    needed = f"n ≥ {times if times > 1 else ''}f+{plus}"
    if n < plus:
        raise CohortError(
            f"Expected at least {plus} updates with strategy.num-byzantine={f}, got n={n} "
            f"({needed}); add sites or pick another rule."
        )
    most = (n - plus) // times + caught
    out = f", where {caught} of the f are quarantined" if caught else ""
    raise CohortError(
        f"Expected strategy.num-byzantine={f} to be at most {most} (n={n} needs "
        f"{needed}{out}); lower it or add sites."
    )
