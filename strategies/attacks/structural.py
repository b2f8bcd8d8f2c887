"""Attacks that use how a payload is built: pairs of LoRA factors, and modules.

Shape suffixes: M malicious sites, D parameters. Options: see `AttackConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from models.layout import Layout
from models.section import ConfigError
from strategies.attacks.config import AttackConfig
from strategies.attacks.view import View
from strategies.cohort import norm
from strategies.product import structure


def gauge_flip(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """The own update with factors (-A, -B): the same product, but the mean of factors shrinks.

    LoRA fixes B @ A only (Sun et al. 2024, FFA-LoRA, section 3): an honest update to all that
    compare products. Raises ConfigError without LoRA pairs.
    """
    return _with_factors(view, lambda a, b: (-a, -b))


def factor_scaling(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """The own update with factors (scale * A, B / scale): the same product, an uneven pair.

    Raises ConfigError without LoRA pairs.
    """
    return _with_factors(view, lambda a, b: (a * options.scale, b / options.scale))


def _with_factors(view: View, turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    pairs = structure(view.layout).pairs
    if not pairs:
        raise no_pairs("'gauge-flip' or 'factor-scaling'")
    sent_MD = view.base_D + view.own_MD
    for row_D in sent_MD:
        for pair in pairs:
            factors = pair.factors(row_D)
            for old, new in zip(factors, turn(*factors), strict=True):
                old.copy_(new)
    return sent_MD - view.base_D


def no_pairs(attack: str) -> ConfigError:
    """What to say of an attack on pairs of LoRA factors where none travel."""
    return ConfigError(
        f"Expected pairs of LoRA factors that travel whole with attack.name={attack}, got none; "
        "set payload.kind='lora' and a rule that sends both A and B, or pick another attack."
    )


def one_layer(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """Everything into one module, against the honest mean, with an honest update's whole norm.

    A bound on the whole vector does not see it (Sun et al. 2019, section 4, discusses norm bounds).
    The module is the one in which the honest sites move most; the norm is their median one.
    """
    mean_D = view.honest_ND.double().mean(0)
    parts = modules(view.layout)
    chosen = max(parts, key=lambda name: float(mean_D[parts[name]].norm()))
    sent_D = torch.zeros_like(mean_D)
    sent_D[parts[chosen]] = -mean_D[parts[chosen]]
    lengths = sorted(norm(row) for row in view.honest_ND)
    length = float(sent_D.norm())
    return view.same(sent_D * (lengths[len(lengths) // 2] / length) if length else sent_D)


def modules(layout: Layout) -> dict[str, Tensor]:
    """Module name to the indices of its values in (D,); a LoRA pair is one module."""
    homes = {name: pair.module for pair in structure(layout).pairs for name in (pair.a, pair.b)}
    found: dict[str, list[Tensor]] = {}
    at = 0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        home = homes.get(name, name.rpartition(".")[0] or name)
        found.setdefault(home, []).append(torch.arange(at, at + prod(shape)))
        at += prod(shape)
    return {home: torch.cat(indices) for home, indices in found.items()}
