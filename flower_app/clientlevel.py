"""Client-level privacy of a run: its terms, who is asked, what is charged, what a site sends."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from logging import WARNING

from flwr.common.logger import log
from torch import Tensor

from flower_app.config import Config
from models.layout import Layout
from models.section import ConfigError
from privacy.accounting import calibrate, check_chance
from privacy.adaptive import Adaptive
from privacy.client_level import Charge, Draw, Terms, noised_at_site, private, require_proof
from privacy.correlated import Correlated, plan
from privacy.events import Event, Mechanism, Place
from privacy.noise import Source
from privacy.secure.distributed import Noise
from privacy.secure.terms import threshold
from strategies import registry
from strategies.sampling import Selection, poisson, rotation, seeded_chance
from strategies.stage import Rule

_WORTH_SAYING = 1.1  # growth of the noise by rounding above which the log says so
_NOISE_AT: dict[str, Place] = {"central": "server", "local": "site", "distributed": "sites"}


def central(config: Config) -> bool:
    """Whether the server adds noise to sums of whole updates."""
    return config.privacy.unit == "client" and config.privacy.place == "central"


def local(config: Config) -> bool:
    """Whether each site adds noise to its whole update."""
    return config.privacy.unit == "client" and config.privacy.place == "local"


def distributed(config: Config) -> bool:
    """Whether each site adds a share of the noise, which only the sum of them has whole."""
    return config.privacy.unit == "client" and config.privacy.place == "distributed"


def at_sites(config: Config) -> bool:
    """Whether what leaves a site has noise for the whole of it, of its own or shared out."""
    return local(config) or distributed(config)


def check(config: Config) -> None:
    """Refuse settings under which a client-level guarantee would not hold; raises ConfigError."""
    if config.train.correction == "scaffold":
        raise ConfigError(
            "Expected train.correction other than 'scaffold' with privacy.unit='client', got "
            "'scaffold', whose server needs to know how many sites took part; set it to 'none'."
        )
    if config.privacy.metrics == "noised":
        raise ConfigError(
            "Expected privacy.metrics='withheld' or 'exact' with privacy.unit='client', got "
            "'noised', whose noise is made for records; set one of them."
        )
    correlated(config)
    noise_multiplier(config)
    if not central(config):
        _check_leaving(config)
    if distributed(config) and config.secure.aggregation != "masks":
        raise ConfigError(
            "Expected secure.aggregation='masks' with privacy.place='distributed', got "
            f"{config.secure.aggregation!r}, where a site's own share of the noise is all that "
            "hides its update; set it, or privacy.place='local'."
        )
    if local(config):
        return
    if config.strategy.weighting != "uniform":
        raise ConfigError(
            "Expected strategy.weighting='uniform' with privacy.unit='client', got "
            f"{config.strategy.weighting!r}; set it, since a site's weight tells of its rows."
        )
    if central(config):
        registry.build(config.strategy, require_proof)


def _check_leaving(config: Config) -> None:
    """Refuse what would leave a site beside its noisy update."""
    if config.privacy.metrics == "exact":
        return
    for key, on in (
        ("train.ditto-lambda", config.train.ditto_lambda > 0),
        ("run.baselines", config.run.baselines),
    ):
        if on:
            raise ConfigError(
                f"Expected no {key} with privacy.place={config.privacy.place!r} and "
                f"privacy.metrics={config.privacy.metrics!r}, got it, whose scores have no noise; "
                "leave it out, or set privacy.metrics='exact' in a simulation with public rows."
            )


def correlated(config: Config) -> Correlated | None:
    """The turns of the sites, where the noise is correlated; raises ConfigError."""
    if config.privacy.unit != "client" or config.privacy.noise != "correlated":
        return None
    return plan(config.run.rounds, config.strategy.fraction, config.privacy.bands)


def noise_multiplier(config: Config) -> float:
    """Noise of one release over its sensitivity, given or calibrated for the whole run.

    Raises ConfigError for an epsilon that no noise can reach, and for a delta that needs none.
    """
    privacy, rounds, rate = config.privacy, config.run.rounds, config.strategy.fraction
    if turns := correlated(config):
        rounds, rate = turns.turns, 1.0
    if not central(config):  # a site is known to take part when it does
        rate = 1.0
    check_chance(rate, rounds, privacy.delta)
    if privacy.noise_multiplier:
        return privacy.noise_multiplier
    noise = calibrate(privacy.epsilon, privacy.delta, rate, rounds, _mechanism(config))
    # Sites must agree on the lattice, also where their processors round the last bit differently.
    return math.ceil(noise * 1e4) / 1e4 if distributed(config) else noise


def _mechanism(config: Config) -> Mechanism:
    return "discrete-gaussian" if distributed(config) else "gaussian"


def shares(config: Config) -> Noise | None:
    """The noise of a sum of which each site adds a share; None where none is to."""
    if not distributed(config):
        return None
    rounding = 1.0 if config.secure.rounding == "stochastic" else 0.5
    return Noise(config.privacy.clip_norm, noise_multiplier(config), rounding)


def terms(config: Config, sites: int) -> Terms:
    """What the guarantee rests on, for a run of `sites` sites with noise at the server."""
    privacy = config.privacy
    adaptive = Adaptive(privacy.clip_quantile, privacy.clip_learning_rate, privacy.clip_count_noise)
    return Terms(
        noise_multiplier(config),
        privacy.clip_norm,
        sites,
        config.strategy.fraction,
        adaptive if privacy.clipping == "adaptive" else None,
        correlated(config),
    )


def chain(config: Config, sites: int, draw: Draw, charge: Charge) -> Rule:
    """The configured chain with noise before the server optimiser; raises ConfigError."""
    agreed = terms(config, sites)
    if agreed.adaptive:
        agreed.adaptive.update_multiplier(agreed.noise_multiplier, agreed.share * sites)
    return registry.build(config.strategy, partial(private, terms=agreed, draw=draw, charge=charge))


def selection(config: Config) -> Selection | None:
    """Who is asked in a round: drawn by coins or in turns; None where any draw will do."""
    strategy, seed = config.strategy, config.run.seed
    if not central(config):
        return None
    if turns := correlated(config):
        return rotation(turns.period, strategy.min_sites, seed)
    seeded = config.privacy.noise_source == "seeded"
    chance = partial(seeded_chance, seed) if seeded else _coin
    return poisson(strategy.fraction, strategy.min_sites, chance)


def _coin(site: str, round_: int) -> float:
    """A chance in [0, 1) that nobody can tell beforehand or afterwards."""
    return secrets.randbits(53) / 2**53


def site_events(config: Config, rounds: Iterable[int]) -> list[Event]:
    """What one site releases in rounds that it takes part in.

    It cannot see whether the server really draws by chance, so that its ledger counts no sampling.
    """
    event = Event(
        _mechanism(config),
        "client",
        noise_multiplier(config),
        noise_at=_NOISE_AT[config.privacy.place],
    )
    turns = correlated(config)
    # Which turn is this site's own is known when it comes; each period has one.
    listed = list(rounds)
    if turns and len(listed) > 1:
        listed = listed[:: turns.period]
    return [replace(event, round=round_) for round_ in listed]


def sent(config: Config, delta: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """A site's update as it leaves: clipped and noised where the site is to do that."""
    if not local(config):
        return delta
    return noised_at_site(delta, config.privacy.clip_norm, noise_multiplier(config), source)


def check_norm(config: Config, layout: Layout, summed: Iterable[int]) -> None:
    """Refuse noise of the sites that the gate would take for an attack; raises ConfigError.

    `summed` are the sites of each secure sum, whose bits must hold its noise too.
    """
    clip_norm, root = config.privacy.clip_norm, layout.size**0.5
    lengths = [clip_norm * noise_multiplier(config) * root] if local(config) else []
    if noise := shares(config):
        for sites in summed:
            bits, range_, least = config.secure.bits, config.secure.range, threshold(sites)
            numbers = noise.numbers(bits, range_, sites, least, layout.size)
            share = noise.share(numbers, least, layout.size) * numbers.step
            lengths.append(share * root / sites**0.5)
            grown = noise.sensitivity(numbers, layout.size) * numbers.step / clip_norm
            if grown > _WORTH_SAYING:
                log(
                    WARNING, "Rounding to secure.bits=%d makes the noise %.2f times as large as "
                    "with more bits.", bits, grown,
                )  # fmt: skip
    length = clip_norm + max(lengths, default=0.0)
    if lengths and length > config.strategy.max_update_norm:
        raise ConfigError(
            f"Expected strategy.max-update-norm of at least {1.1 * length:.4g}, the norm of the "
            f"sites' noise on {layout.size} values, got {config.strategy.max_update_norm:g}; raise "
            "it, lower privacy.clip-norm, or train fewer values."
        )
