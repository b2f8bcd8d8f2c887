"""A site's update as the whole numbers of a sum, with a share of the noise where it adds one."""

from __future__ import annotations

from logging import WARNING

import numpy as np
from flwr.common.logger import log
from torch import Tensor

from flower_app import compose
from flower_app.config import Config
from models.seeds import derive
from models.train import TrainingError
from privacy.secure.fixed_point import Words
from privacy.secure.terms import Terms


def rounded(
    config: Config, terms: Terms, site: str, delta_D: Tensor, weight: int, scale: int
) -> Words:
    """Numbers of `delta_D`, (D,) float32, and of its weight; `scale` is at least any weight.

    Raises TrainingError for an update that is not finite: no gate will ever see it, and in a sum it
    would pass for zeros and for the ends of the range.
    """
    if wrong := int((~delta_D.isfinite()).sum()):
        raise TrainingError(
            f"Expected a finite update, got one with {wrong} of {terms.size} values NaN or "
            "infinite; lower train.learning-rate."
        )
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
