"""A site's update as the whole numbers of a sum, with a share of the noise where it adds one."""

from __future__ import annotations

from logging import WARNING

import numpy as np
from flwr.common.logger import log
from torch import Tensor

from flower_app import compose
from flower_app.config import Config
from models.seeds import derive
from privacy.secure.fixed_point import Words
from privacy.secure.terms import Terms


def rounded(
    config: Config, terms: Terms, site: str, delta_D: Tensor, weight: int, scale: int
) -> Words:
    """Numbers of `delta_D`, (D,) float32, and of its weight; `scale` is at least any weight."""
    generator = None
    if config.secure.rounding == "stochastic":
        generator = np.random.default_rng(derive(config.run.seed, "rounding", site, terms.round))
    numbers, update_D = terms.numbers, delta_D.numpy()
    if terms.noise:
        source = compose.noise_source(config, "client", site, terms.round)
        words, cut = terms.noise.encode(numbers, update_D, terms.threshold, source, generator)
    else:
        words, cut = numbers.encode(update_D, weight, scale, generator)
    if cut:
        log(
            WARNING, "%d of %d changes exceed secure.range=%g and were cut off.",
            cut, terms.size, config.secure.range,
        )  # fmt: skip
    return words
