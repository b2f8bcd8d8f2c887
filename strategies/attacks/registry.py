"""Names of attacks, what each consists of, and which sites carry it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from models.section import ConfigError, unknown
from models.seeds import derive
from strategies.attacks import colluding, malformed, single, structural
from strategies.attacks.config import AttackConfig
from strategies.attacks.malformed import Spoil
from strategies.attacks.view import Forge, View
from strategies.sampling import sample

Poison: TypeAlias = Literal["none", "label-flip", "backdoor", "poisoned-instructions"]


@dataclass(frozen=True)
class Attack:
    """What malicious sites do: to their rows, to the update they send, and to the reply itself.

    `scale` is the strength unless the settings give one, None where the attack has none. A scale
    of 0 means that the attack works it out (`alie`, `scaling`) or does without (`free-rider`).
    `pairs` is whether it works on pairs of LoRA factors.
    """

    poison: Poison = "none"
    forge: Forge = single.own
    spoil: Spoil | None = None
    scale: float | None = None
    pairs: bool = False

    @property
    def rewrites(self) -> bool:
        """Whether replies are changed on their way, and not rows alone."""
        return self.forge is not single.own or self.spoil is not None

    def forged(self, view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
        """The deltas that the malicious sites send, (M, D), with the scale filled in."""
        scale = options.scale or self.scale or 0.0
        return self.forge(view, options.model_copy(update={"scale": scale}), generator)


ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        "none": Attack(),
        "label-flip": Attack(poison="label-flip"),
        "backdoor": Attack(poison="backdoor"),
        "poisoned-instructions": Attack(poison="poisoned-instructions"),
        "sign-flip": Attack(forge=single.sign_flip, scale=4.0),
        "scaling": Attack(poison="backdoor", forge=single.scaling, scale=0.0),
        "gaussian": Attack(forge=single.gaussian, scale=10.0),
        "alie": Attack(forge=colluding.alie, scale=0.0),
        "ipm": Attack(forge=colluding.ipm, scale=0.5),
        "mimic": Attack(forge=colluding.mimic),
        "min-max": Attack(forge=colluding.min_max),
        "min-sum": Attack(forge=colluding.min_sum),
        "free-rider": Attack(forge=single.free_rider, scale=0.0),
        "sybil": Attack(poison="label-flip", forge=colluding.sybil),
        "weight-inflation": Attack(poison="label-flip", spoil=malformed.inflated),
        "gauge-flip": Attack(forge=structural.gauge_flip, pairs=True),
        "factor-scaling": Attack(forge=structural.factor_scaling, scale=10.0, pairs=True),
        "one-layer": Attack(forge=structural.one_layer),
        **{name: Attack(spoil=fault.spoil) for name, fault in malformed.FAULTS.items()},
    }
)


def pick(config: AttackConfig) -> Attack:
    """The attack that `attack.*` names; raises ConfigError listing the choices."""
    if config.name not in ATTACKS:
        raise unknown("attack.name", config.name, ATTACKS)
    attack = ATTACKS[config.name]
    if config.scale and attack.scale is None:
        having = ", ".join(name for name, other in ATTACKS.items() if other.scale is not None)
        raise ConfigError(
            f"Expected attack.scale=0 with attack.name={config.name!r}, which has no strength to "
            f"set, got {config.scale:g}; set it to 0, or pick one of {having}."
        )
    return attack


def malicious(names: Iterable[str], config: AttackConfig, seed: int) -> frozenset[str]:
    """Sites that carry out the attack, the same wherever it is asked: none without an attack.

    At least `attack.fraction` of the names, and at least one, by a seeded hash of each name.
    """
    if config.name == "none":
        return frozenset()
    return frozenset(sample(names, config.fraction, 1, derive(seed, "attack"), 0))
