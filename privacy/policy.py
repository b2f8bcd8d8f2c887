"""The policy of a site: a file of its operator's, which no server can widen."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from models.section import ConfigError, Section, unknown
from privacy.accounting import check_chance, spent, within
from privacy.events import RELATIONS, Event, Unit, of_unit


class PolicyError(ConfigError):
    """A run that the policy of a site does not allow: says what it allows and what was asked."""


@dataclass(frozen=True)
class Request:
    """What a run asks of a site; `base` is the digest of its model, `rows` its training rows."""

    unit: str
    payload: str
    base: str
    rows: int
    rounds: int
    secure_aggregation: bool


class Policy(Section):
    """What a site takes part in; a key that is left out allows everything."""

    max_epsilon: float | None = Field(
        None,
        gt=0,
        description="Epsilon that all runs together may spend, for one record or client, "
        "as the run protects one or the other; for one position with "
        '`require-unit = "position"`.',
    )
    delta: float = Field(1e-5, ge=1e-12, lt=1, description="Delta that `max-epsilon` is for.")
    min_noise_multiplier: float | None = Field(
        None, gt=0, description="Least noise of a release, in standard deviations over sensitivity."
    )
    require_unit: Unit | None = Field(
        None,
        description="What a run must protect: `record`, `client`, or `position`, which is no more "
        "than the vectors on the stream of a split run (`split.noise`).",
    )
    trust_server_noise: bool = Field(
        False, description="Whether noise that the server adds counts as noise here."
    )
    trust_peer_noise: bool = Field(
        False,
        description="Whether noise of which this site adds only a share counts as noise here.",
    )
    require_secure_aggregation: bool = Field(
        False, description="Whether the server may see only sums of updates."
    )
    allowed_payloads: list[str] | None = Field(None, description="Values of `payload.kind`.")
    allowed_base_models: list[str] | None = Field(
        None, description="Digests of base models, as the log of a roll call shows them."
    )
    min_rows: int | None = Field(None, ge=1, description="Fewest rows to train on.")
    max_rows: int | None = Field(None, ge=1, description="Most rows to train on.")
    max_rounds: int | None = Field(
        None,
        ge=1,
        description="Most rounds of a run; with `state-path`, those that are trained again count.",
    )

    @property
    def wants_noise(self) -> bool:
        """Whether a run without differential privacy is refused."""
        return bool(self.max_epsilon or self.min_noise_multiplier or self.require_unit)

    def limits(self, unit: str) -> bool:
        """Whether what the policy says of noise and epsilon is for such a unit."""
        return unit == self.require_unit if self.require_unit else unit in ("record", "client")

    def admit(self, request: Request) -> None:
        """Refuse a run for what it is, whatever it would spend; raises PolicyError."""
        if self.wants_noise and not self.limits(request.unit):
            remedy = "ask for it"
            if request.unit == "position" and not self.require_unit:
                remedy += ", or let the site set require-unit='position'"
            raise self._refusal(_asks(self.require_unit or "record"), repr(request.unit), remedy)
        if self.require_secure_aggregation and not request.secure_aggregation:
            raise self._refusal("secure aggregation", "none", "set secure.aggregation")
        self._among("payload.kind", request.payload, self.allowed_payloads)
        self._among("the base model", request.base, self.allowed_base_models)
        limits = (
            ("rows to train on", request.rows, self.min_rows, self.max_rows),
            ("rounds (run.rounds)", request.rounds, None, self.max_rounds),
        )
        for what, got, least, most in limits:
            if least and got < least:
                raise self._refusal(f"at least {least} {what}", str(got), "leave this site out")
            if most and got > most:
                raise self._refusal(f"at most {most} {what}", str(got), "lower them")

    def check_rounds(self, count: int) -> None:
        """Refuse to train in the `count`-th round that a run has asked for; raises PolicyError."""
        if self.max_rounds and count > self.max_rounds:
            raise self._refusal(
                f"at most {self.max_rounds} rounds of a run",
                f"{count}, with those that were asked for again",
                "let the site raise max-rounds",
            )

    def check_noise(self, events: Sequence[Event]) -> None:
        """Refuse releases with too little noise, or of somebody not trusted; raises PolicyError."""
        if not self.wants_noise:
            return
        if not events:
            raise self._refusal("releases with noise", "none", "ask for privacy.unit='record'")
        least = self.min_noise_multiplier or 0.0
        for event in events:
            if event.noise_at == "server" and not self.trust_server_noise:
                raise self._refusal(
                    "noise that this site adds", "noise at the server",
                    "add it at the sites, or let the site set trust-server-noise",
                )  # fmt: skip
            if event.noise_at == "sites" and not self.trust_peer_noise:
                raise self._refusal(
                    "noise that this site adds", "a share of it at each of the sites",
                    "set privacy.place='local', or let the site set trust-peer-noise",
                )  # fmt: skip
            if event.mechanism == "none" or event.noise_multiplier < least:
                raise self._refusal(
                    f"a noise multiplier of at least {max(least, 1e-9):g}",
                    f"{event.noise_multiplier:.4g} ({event.part} rows)",
                    "raise split.noise, twice this"
                    if event.unit == "position"
                    else "raise privacy.noise-multiplier, or lower privacy.epsilon",
                )

    def check_budget(self, unit: Unit, past: Sequence[Event], planned: Sequence[Event]) -> None:
        """Refuse what would take all releases together beyond `max-epsilon`; raises PolicyError."""
        if not self.max_epsilon:
            return
        before, new = of_unit(past, unit), of_unit(planned, unit)
        try:
            for event in new:
                check_chance(event.sample_rate, event.count, self.delta)
        except ConfigError as error:
            raise PolicyError(f"By this site's policy: {error}") from error
        if within([*before, *new], self.delta, self.max_epsilon):
            return
        already, alone = spent(before, self.delta), spent(new, self.delta)
        together = spent([*before, *new], self.delta)
        raise self._refusal(
            f"at most epsilon {self.max_epsilon:g} (max-epsilon; per {unit}, delta "
            f"{self.delta:g}, {RELATIONS[unit]})",
            f"{_number(together)} with this run: {_number(already)} was spent before, "
            f"{_number(max(0.0, self.max_epsilon - already))} remains, and {_rounds(planned)} "
            f"would by themselves spend {_number(alone)}",
            "ask for more noise or fewer rounds"
            if math.isfinite(already)
            else "leave this site out, whose ledger has releases without noise",
        )

    def _among(self, what: str, got: str, allowed: Collection[str] | None) -> None:
        if allowed is not None and got not in allowed:
            listed = ", ".join(allowed) or "none at all"
            raise self._refusal(f"{what} to be among {listed}", repr(got), "pick one of them")

    def _refusal(self, expected: str, got: str, remedy: str) -> PolicyError:
        return PolicyError(f"Expected {expected} by this site's policy, got {got}; {remedy}.")


def read_policy(path: Path) -> Policy:
    """Read a policy file in TOML; raises ConfigError for one that is missing or not understood."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a policy in TOML at {str(path)!r} (policy-path in this node's config), but: "
            f"{error}; mend it. Without it the site takes part in nothing."
        ) from error
    known = [str(info.alias) for info in Policy.model_fields.values()]
    for key in values:
        if key not in known:
            raise unknown("key of the site's policy", key, known)
    try:
        policy = Policy.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            f"Expected a policy that can be followed, but {wrong}; mend {str(path)!r}."
        ) from error
    if policy.min_rows and policy.max_rows and policy.min_rows > policy.max_rows:
        raise ConfigError(
            f"Expected min-rows of at most max-rows={policy.max_rows} in the site's policy, got "
            f"{policy.min_rows}; change one."
        )
    return policy


def _asks(unit: Unit) -> str:
    """The setting of a run that protects a unit."""
    return "split.noise above 0" if unit == "position" else f"privacy.unit={unit!r}"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "no bound at all"


def _rounds(planned: Sequence[Event]) -> str:
    rounds = {event.round for event in planned}
    return f"its {len(rounds)} rounds" if len(rounds) > 1 else f"round {min(rounds)}"
