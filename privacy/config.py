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
    noise_source: Literal["secure", "seeded"] = Field(
        "secure",
        description="Where noise and private sampling come from: the system's cryptographic "
        "generator, or `run.seed`, so that a simulation can be repeated; refused at deployed "
        "sites.",
    )
    per_sample: Literal["auto", "ghost", "hooks", "microbatch"] = Field(
        "auto",
        description='How gradients of single records are computed with `unit = "record"`: ghost '
        "clipping, Opacus' hooks, one record at a time, or the first of these that a check at the "
        "start finds exact.",
    )
    metrics: Literal["withheld", "noised", "exact"] = Field(
        "withheld",
        description="Scores on held-out rows where the sites add the noise: kept at the site; sent "
        'with noise (`unit = "record"`), which the held-out rows pay for; or sent as they are, in '
        "a simulation whose held-out rows are public.",
    )
    metrics_noise_multiplier: float = Field(
        0.0,
        ge=0,
        description='Noise of `metrics = "noised"`: standard deviation over what a row can change; '
        "0 where it is calibrated so that held-out rows spend `epsilon` too.",
    )
    metrics_loss_bound: float = Field(
        8.0,
        gt=0,
        description="Loss, in nats, above which a held-out row counts with this in "
        '`metrics = "noised"`.',
    )
    place: Literal["central", "local", "distributed"] = Field(
        "central",
        description='Who adds the noise with `unit = "client"`: the server, which sees the '
        "updates as they are; each site, before its update leaves (`local`); or each site a share "
        'of it, so that the sum has enough (`distributed`, with `secure.aggregation = "masks"`).',
    )
    clipping: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="Whether `clip-norm` stays, or follows a quantile of the updates' norms, with "
        '`unit = "client"` and noise at the server.',
    )
    clip_quantile: float = Field(
        0.5, gt=0, lt=1, description="Share of the updates that adaptive clipping leaves whole."
    )
    clip_learning_rate: float = Field(
        0.2, gt=0, le=2, description="How fast adaptive clipping moves, on a log scale."
    )
    clip_count_noise: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of the noise on the number of updates within the norm; 0 "
        "takes a twentieth of the expected number, and at least twice the noise multiplier.",
    )
    noise: Literal["independent", "correlated"] = Field(
        "independent",
        description="Whether rounds get noise of their own and sites are sampled, or sites take "
        "turns and later noise takes back earlier one (matrix factorisation).",
    )
    bands: int = Field(
        0,
        ge=0,
        description="Rounds that correlated noise reaches over; 0 takes the number of least error.",
    )

    @property
    def noised_by_sites(self) -> bool:
        """Whether the noise is added before anything leaves a site."""
        return self.unit == "record" or (self.unit == "client" and self.place != "central")

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
        self._check_metrics()
        self._check_clients()

    def _check_metrics(self) -> None:
        noise = self.metrics_noise_multiplier
        if noise and self.metrics != "noised":
            raise ConfigError(
                "Expected privacy.metrics='noised' with privacy.metrics-noise-multiplier="
                f"{noise:g}, got {self.metrics!r}; set one of them."
            )
        if self.metrics == "noised" and not noise and not self.epsilon:
            raise ConfigError(
                "Expected privacy.metrics-noise-multiplier above 0 with privacy.metrics='noised' "
                "and no privacy.epsilon, got 0; set it, or privacy.metrics='withheld'."
            )

    def _check_clients(self) -> None:
        central = self.unit == "client" and self.place == "central"
        for key, usual in (("clipping", "fixed"), ("noise", "independent")):
            if (got := getattr(self, key)) != usual and not central:
                raise ConfigError(
                    "Expected privacy.unit='client' and privacy.place='central' with "
                    f"privacy.{key}={got!r}, got {self.unit!r} and {self.place!r}; set them, or "
                    f"privacy.{key}={usual!r}."
                )
        if self.place != "central" and self.unit != "client":
            raise ConfigError(
                f"Expected privacy.unit='client' with privacy.place={self.place!r}, got "
                f"{self.unit!r}; "
                "records are always protected at their site. Set privacy.place='central'."
            )
        if self.clipping == "adaptive" and self.noise == "correlated":
            raise ConfigError(
                "Expected privacy.clipping='fixed' with privacy.noise='correlated', got "
                "'adaptive'; noise that spans rounds needs one norm for all of them."
            )
