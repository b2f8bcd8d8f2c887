"""Attacks that each malicious site could carry out alone, on its own update.

Shape suffixes: N honest sites, M malicious sites, D parameters. Options: see `AttackConfig`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from strategies.attacks.config import AttackConfig
from strategies.attacks.view import View
from strategies.cohort import norm


def own(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """The site's own updates as they are: the attack lies in its rows, or beside the update."""
    return view.own_MD.clone()


def sign_flip(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """-scale times the own update (Li et al. 2019, RSA, sign-flipping attack)."""
    return view.own_MD * -options.scale


def scaling(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """Model replacement (Bagdasaryan et al. 2020, equation 3): scale times the own update.

    A scale of 0 stands for (N + M) / M, with which the mean takes over the malicious updates whole.
    """
    return view.own_MD * (options.scale or view.sites / view.malicious)


def gaussian(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """Noise instead of an update (Blanchard et al. 2017, Gaussian attack): N(0, s^2) each value.

    s is scale times the root mean square of the honest updates' values, so that one scale fits
    payloads of any size.
    """
    spread = options.scale * float(view.honest_ND.double().square().mean().sqrt())
    return torch.randn(view.own_MD.shape, generator=generator) * spread


def free_rider(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """No training at all (Fraboni et al. 2021, plain and disguised free-riding).

    Zero, or with a scale Gaussian noise of scale times the honest updates' mean norm.
    """
    shape = view.own_MD.shape
    lengths = [norm(row) for row in view.honest_ND]
    spread = options.scale * math.fsum(lengths) / len(lengths) / math.sqrt(shape[1])
    return torch.randn(shape, generator=generator) * spread
