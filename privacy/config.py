"""`privacy.*`: what is guaranteed, to whom, and how much of it is spent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.section import ConfigError, Section


class PrivacyConfig(Section):
    """`privacy.*`: differential privacy of a run."""

    unit: Literal["none", "record", "client"] = Field(
        "none",
        description="What one guarantee protects: a `record` (DP-SGD at every site), a `client`, "
        "which is all that a site sends (clipping and noise on whole updates), or `none`.",
    )
    epsilon: float = Field(
        0.0,
        ge=0,
        description="Epsilon that the whole run may spend, from which the noise is calibrated; 0 "
        "where `noise-multiplier` is given.",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta that every epsilon is stated for.")
    noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of the noise over the clipping norm; 0 where it is "
        "calibrated from `epsilon`.",
    )
    clip_norm: float = Field(
        1.0,
        gt=0,
        description="L2 norm to which a record's gradient, or a client's update, is clipped.",
    )

    @property
    def on(self) -> bool:
        """Whether a guarantee is asked for."""
        return self.unit != "none"

    def check(self) -> None:
        """Refuse settings that contradict each other; raises ConfigError."""
        given = f"epsilon={self.epsilon:g} and noise-multiplier={self.noise_multiplier:g}"
        if not self.on and (self.epsilon or self.noise_multiplier):
            raise ConfigError(
                "Expected privacy.epsilon=0 and privacy.noise-multiplier=0 with "
                f"privacy.unit='none', got {given}; set privacy.unit to 'record' or 'client'."
            )
        if self.on and bool(self.epsilon) == bool(self.noise_multiplier):
            raise ConfigError(
                "Expected exactly one of privacy.epsilon and privacy.noise-multiplier above 0 with "
                f"privacy.unit={self.unit!r}, got {given}; set the other to 0."
            )
