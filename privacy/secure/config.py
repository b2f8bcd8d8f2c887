"""`secure.*`: whether and how the sites' updates are summed without anyone seeing one of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.section import ConfigError, Section


class SecureConfig(Section):
    """`secure.*`: secure aggregation."""

    aggregation: Literal["none", "masks", "ckks"] = Field(
        "none",
        description="`masks` shows the server sums over groups of sites only (Bonawitz et al. "
        "2017); `ckks` too, as long as no site with the secret key helps it (homomorphic "
        "encryption, an extra); `none` shows it each site's update.",
    )
    bits: int = Field(
        32, ge=8, le=32, description="Bits of a number on the wire, in which a whole sum must fit."
    )
    range: float = Field(
        1.0, gt=0, description="Largest change of one parameter that travels; beyond it is cut off."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        "stochastic",
        description="How a change becomes a multiple of the smallest step: `stochastic` is right "
        "on average, `nearest` is closest.",
    )
    groups: int = Field(
        1,
        ge=1,
        description="Sums per round, over groups drawn at random; robust rules compare those.",
    )
    min_group: int = Field(
        3, ge=3, description="Fewest sites of a sum: with two, each would know the other's update."
    )
    stage_s: float = Field(
        120.0, gt=0, description="Seconds the sites have for each step before and after training."
    )

    @property
    def on(self) -> bool:
        """Whether the server sees sums only."""
        return self.aggregation != "none"

    def check(self) -> None:
        """Refuse settings that contradict each other; raises ConfigError."""
        if not self.on and self.groups > 1:
            raise ConfigError(
                f"Expected secure.groups=1 with secure.aggregation='none', got {self.groups}; set "
                "secure.aggregation='masks', or leave groups out."
            )
