"""`strategy.*`: how the sites' updates become the next model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.section import ConfigError, Section


class StrategyConfig(Section):
    """`strategy.*`: selection of sites, weighting, gate, rule and server optimiser."""

    rule: str = Field("mean", min_length=1, description="Aggregation rule.")
    pre: str = Field(
        "", description="Comma-separated pre-aggregation stages, in order; empty for none."
    )
    clip_norm: float = Field(
        1.0, gt=0, description="L2 norm to which `clip` and `norm-bounding` scale updates."
    )
    num_byzantine: int = Field(
        1,
        ge=0,
        description="Sites that may lie, f, which robust rules are told; where a site that the "
        "gate refuses leaves too few, it counts as one of them.",
    )
    screen_threshold: float = Field(
        5.0, gt=0, description="Robust z-score of a module beyond which `module-screen` acts."
    )
    num_selected: int = Field(
        0,
        ge=0,
        description="Updates that `multi-krum` keeps, at most all but `num-byzantine`; 0 keeps as "
        "many.",
    )
    bucket_size: int = Field(2, ge=1, description="Updates to a bucket of `bucketing`.")
    iterations: int = Field(100, ge=1, description="Weiszfeld steps of `geometric-median`.")
    smoothing: float = Field(
        1e-6, gt=0, description="Distance below which `geometric-median` does not tell apart."
    )
    clip_radius: float = Field(
        1.0, gt=0, description="L2 distance from the centre to which `centered-clipping` clips."
    )
    clip_iterations: int = Field(
        3, ge=1, description="Steps of `centered-clipping` towards its centre in a round."
    )
    root_source: str = Field(
        "",
        description="File of rows at the server, in the sites' format, on which `fltrust` trains "
        "an update of its own in each round.",
    )
    server_optimizer: str = Field(
        "none",
        min_length=1,
        description="`none` adds the aggregated update; `momentum`, `adam`, `yogi` and `adagrad` "
        "treat it as a pseudo-gradient (Reddi et al. 2021).",
    )
    server_learning_rate: float = Field(
        1.0,
        gt=0,
        description="Step size of the server optimiser; `none` uses 1. `adam`, `yogi` and "
        "`adagrad` move each value by up to about as much in a round: 0.001 to 0.02 suits LoRA.",
    )
    server_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum, beta1 of Adam and Yogi.")
    server_beta2: float = Field(
        0.99, ge=0, lt=1, description="Second-moment decay of Adam and Yogi."
    )
    server_tau: float = Field(1e-3, gt=0, description="Adaptivity floor of Adam, Yogi, Adagrad.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the sites asked in each round.")
    min_sites: int = Field(1, ge=1, description="Fewest sites a run starts and a round ends with.")
    weighting: Literal["examples", "uniform"] = Field(
        "examples", description="Weight of a site: its training rows, or the same for all."
    )
    weight_cap: int = Field(
        100_000, ge=1, description="Most training rows a site is credited with."
    )
    max_update_norm: float = Field(
        1e4, gt=0, description="An update with a larger L2 norm is quarantined."
    )

    @property
    def trusts(self) -> bool:
        """Whether a stage compares the sites' updates with one of the server's own."""
        return "fltrust" in (self.rule, *(name.strip() for name in self.pre.split(",")))

    def check(self) -> None:
        """Refuse settings that contradict each other; raises ConfigError."""
        if self.trusts and not self.root_source:
            raise ConfigError(
                "Expected strategy.root-source with 'fltrust', got nothing; name a file of rows at "
                "the server, or pick another rule."
            )
        if self.server_optimizer == "none" and self.server_learning_rate != 1.0:
            raise ConfigError(
                "Expected strategy.server-learning-rate=1 with server-optimizer='none', got "
                f"{self.server_learning_rate}; pick 'momentum' with server-momentum=0 for a scaled "
                "step."
            )
