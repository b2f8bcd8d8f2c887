"""Conditions on the number of sites and of those that may lie."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.cohort import CohortError

NumByzantine: TypeAlias = Annotated[int, Field(ge=0)]


def tolerated(n: int, f: int, times: int, plus: int, caught: int = 0) -> int:
    """How many of n rows a rule takes for lies, given num_byzantine=f; raises CohortError.

    It is f if n >= times * f + plus. Where that fails because the gate has set `caught` sites
    aside, f goes down with n, by one for each of them at most; not before, since a site that was
    caught may have been an honest one.
    """
    most = (n - plus) // times
    if n >= plus and most >= f - caught:
        return min(f, most)
    needed = f"n ≥ {times if times > 1 else ''}f+{plus}"
    if n < plus:
        raise CohortError(
            f"Expected at least {plus} updates with strategy.num-byzantine={f}, got n={n} "
            f"({needed}); add sites or pick another rule."
        )
    out = f", where {caught} of the f are quarantined" if caught else ""
    raise CohortError(
        f"Expected strategy.num-byzantine={f} to be at most {most + caught} (n={n} needs "
        f"{needed}{out}); lower it or add sites."
    )
