"""The composition root: the only place where a configured name becomes an object."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flower_app import clientlevel
from flower_app.adversary import Adversary
from flower_app.conditions import check_records
from flower_app.config import Config
from flower_app.data import poison
from flower_app.data.format import prompt_maker
from flower_app.data.site import label_names
from flower_app.node import NodeConfig
from flower_app.split.server import SplitExchange, SplitServer
from flower_app.split.sharing import Sharing
from models import attention, base, payload
from models.base import Base
from models.layout import Layout
from models.payload import Payload, prompting
from models.section import ConfigError
from models.seeds import derive
from models.split import base as split
from models.split.base import SplitBase
from models.split.load import SERVER, SITE
from privacy import noise
from privacy.client_level import Charge
from privacy.noise import Source
from privacy.secure import groups
from privacy.secure.encrypted import Encrypted
from privacy.secure.exchange import Masks
from strategies import control, registry, together
from strategies.attacks import registry as attacks
from strategies.attacks.registry import Attack
from strategies.attacks.structural import no_pairs
from strategies.cohort import CohortError
from strategies.exchange import Exchange, Plain
from strategies.lora import check_ranks, frozen_factor
from strategies.sampling import sample
from strategies.stage import Rule


def check_names(config: Config) -> None:
    """Refuse unknown payload kinds, rules, stages, options and template fields.

    Raises ConfigError, and DataError for the template.
    """
    payload.check_kind(config.payload)
    if config.train.packing == "on" and prompting(config.payload.kind):
        raise ConfigError(
            f"Expected train.packing='off' or 'auto' with payload.kind={config.payload.kind!r}, "
            "got 'on'; virtual tokens belong to one document each."
        )
    prompt_maker(config.data.template)
    registry.build(config.strategy)
    poison.check(attack(config).poison, config.data)
    if attack(config).pairs and not _sends_pairs(config):
        raise no_pairs(repr(config.attack.name))
    _check_factors(config)
    _check_ditto(config)
    check_privacy(config)
    _check_secure(config)


def check_privacy(config: Config) -> None:
    """Refuse guarantees that would not hold; raises ConfigError."""
    if config.privacy.unit == "client":
        clientlevel.check(config)
    if config.privacy.unit == "record":
        check_records(config)


def noise_source(config: Config, *purpose: str | int) -> Source:
    """Where noise for `purpose` comes from; the same purpose repeats only what is seeded."""
    if config.privacy.noise_source == "seeded":
        return noise.seeded(config.run.seed, *purpose)
    return noise.secure()


def _check_secure(config: Config) -> None:
    """Refuse what needs the update of a single site at the server."""
    groups.check_rule(config.secure, config.strategy)
    if not config.secure.on:
        return
    mode = f"secure.aggregation={config.secure.aggregation!r}"
    if attack(config).rewrites:
        raise ConfigError(
            f"Expected an attack on the sites' rows with {mode}, got attack.name="
            f"{config.attack.name!r}, which rewrites updates that nobody sees; set attack.name to "
            "one that poisons rows, or secure.aggregation='none'."
        )
    if clientlevel.central(config):
        raise ConfigError(
            f"Expected privacy.place='local' or 'distributed' with {mode} and privacy.unit="
            "'client', got 'central', where the server clips each update; set one of them, or "
            "secure.aggregation='none'."
        )


def _check_factors(config: Config) -> None:
    """Refuse LoRA rules on payloads of which they do not find the factors that they work on."""
    rule = config.strategy.rule
    if rule.startswith("lora-") and config.payload.kind not in ("lora", "split"):
        raise ConfigError(
            f"Expected payload.kind='lora' with strategy.rule={rule!r}, got "
            f"{config.payload.kind!r}; set it, or strategy.rule='mean'."
        )
    if config.payload.site_ranks:
        check_ranks(rule, f"payload.site-ranks={config.payload.site_ranks!r}")
    halves = {part for entry in personal(config).split(",") for part in entry.strip().split(".")}
    whole = ("lora-mean", "lora-svd", "lora-exact", "lora-stack", "lora-alternate")
    if rule in whole and halves & {"lora_A", "lora_B"}:
        raise ConfigError(
            f"Expected whole pairs of factors to travel with strategy.rule={rule!r}, got "
            f"payload.personal={config.payload.personal!r}; leave lora_A and lora_B out of it, or "
            "set strategy.rule='mean'."
        )
    if _sends_pairs(config):
        strategy = config.strategy
        together.check_factors(rule, registry.split_names(strategy.pre), strategy.server_optimizer)


def _sends_pairs(config: Config) -> bool:
    """Whether there are pairs of LoRA factors that travel whole."""
    kind, split_ = config.payload.kind, config.split
    parts = (split_.head, split_.tail) if kind == "split" else (kind,)
    own = {entry.strip() for entry in personal(config).split(",")}
    return "lora" in parts and not own & {"lora_A", "lora_B"} and not _frozen(config)


def _check_ditto(config: Config) -> None:
    """Refuse what leaves Ditto's personal model without a shared one to stay close to."""
    if not config.train.ditto_lambda:
        return
    if personal(config):
        raise ConfigError(
            f"Expected the whole payload to travel with train.ditto-lambda, got {personal(config)} "
            "personal; set payload.personal='' and another rule, or train.ditto-lambda=0."
        )
    if _sends_pairs(config):
        together.check_personal(config.strategy.rule, registry.split_names(config.strategy.pre))


def chain(config: Config, sites: int, charge: Charge) -> Rule:
    """The aggregation chain: pre-aggregation, rule, noise where there is any, server optimiser.

    `charge` writes down what the server releases about clients in a run of `sites` sites.
    """
    if not clientlevel.central(config):
        return registry.build(config.strategy)

    def draw(generator: torch.Generator) -> Source:
        ticket = int(torch.randint(2**62, (), generator=generator))
        return noise_source(config, "client", ticket)

    return clientlevel.chain(config, sites, draw, charge)


def sent(config: Config, delta: dict[str, Tensor], site: str, round_: int) -> dict[str, Tensor]:
    """A site's update of a round as it leaves, with the noise that the site adds to all of it."""
    return clientlevel.sent(config, delta, noise_source(config, "client", site, round_))


def alone(config: Config) -> Rule:
    """What a federation of one site does with its updates: only the server optimiser is left."""
    return registry.build(config.strategy.model_copy(update={"rule": "mean", "pre": ""}))


def attack(config: Config) -> Attack:
    """What the malicious sites of a simulation do."""
    return attacks.pick(config.attack)


def malicious(config: Config, sites: Iterable[str]) -> frozenset[str]:
    """Sites of a simulation that carry out the configured attack."""
    return attacks.malicious(sites, config.attack, config.run.seed)


def adversary(config: Config, layout: Layout, sites: Iterable[str]) -> Adversary | None:
    """Who rewrites the replies of malicious sites; None where no attack does that."""
    picked = attack(config)
    if not picked.rewrites:
        return None
    chosen = malicious(config, sites)
    return Adversary(picked, config.attack, chosen, layout, config.run.seed)


def check_sites(config: Config, sites: Iterable[str]) -> None:
    """Refuse a chain that needs more updates than `sites` send in a round; raises ConfigError."""
    try:
        registry.build(config.strategy).requires(len(_summed(config, sites)))
    except CohortError as error:
        raise ConfigError(str(error)) from error


def _summed(config: Config, sites: Iterable[str]) -> list[int]:
    """Sites behind each row that the rule gets in a round; raises CohortError for too few."""
    settings, secure, seed = config.strategy, config.secure, config.run.seed
    asked = sample(sites, settings.fraction, settings.min_sites, seed, 1)
    if not secure.on:
        return [1] * len(asked)
    members = groups.drawn(asked, secure.groups, secure.min_group, seed, 1)
    return [len(names) for names in members]


def check_noise(config: Config, layout: Layout, sites: Iterable[str]) -> None:
    """Refuse noise of the sites that the server could not take in; raises ConfigError."""
    clientlevel.check_norm(config, layout, _summed(config, sites))


def num_labels(config: Config) -> int:
    """Classes of a classification task, 0 for others; raises ConfigError when nobody says."""
    if config.model.task != "classification":
        return 0
    count = config.model.num_labels or len(label_names(config.data))
    if count < 2:
        raise ConfigError(
            "Expected model.num-labels or data.labels for a classification task, got neither; "
            "name the classes, since no site sees all the data."
        )
    return count


def num_classes(loaded: Base) -> int:
    """Classes that a loaded classification model tells apart."""
    return int(loaded.model.config.num_labels or 0)


def personal(config: Config) -> str:
    """The parts of the payload that stay at the site, comma-separated."""
    own = ["lora_B"] if config.strategy.rule == "lora-share-a" else []
    return ",".join(filter(None, [config.payload.personal, *own]))


def _frozen(config: Config) -> str:
    """The part of the payload that is never trained."""
    return "lora_A" if config.strategy.rule == "lora-freeze-a" else ""


def site_rank(config: Config, node: NodeConfig) -> int:
    """Rank of LoRA at a site; raises ConfigError for one that it cannot have."""
    whole = config.payload.rank
    if node.simulated:
        return config.payload.rank_at(node.partition_id)
    if config.payload.site_ranks:
        raise ConfigError(
            "Expected no payload.site-ranks with deployed sites, got "
            f"{config.payload.site_ranks!r}; leave it empty, each names 'rank' in its node config."
        )
    if node.rank > whole:
        raise ConfigError(
            f"Expected 'rank' of at most {whole} (payload.rank) in this node's config, got "
            f"{node.rank}; lower it, or ask for a run with a higher payload.rank."
        )
    if node.rank and config.payload.kind != "lora":
        raise ConfigError(
            f"Expected payload.kind='lora' with 'rank' in this node's config, got "
            f"{config.payload.kind!r}; leave 'rank' out."
        )
    if 0 < node.rank < whole:
        check_ranks(config.strategy.rule, f"sites of a rank below payload.rank={whole}")
    return node.rank or whole


def held(config: Config, round_: int) -> str:
    """The LoRA factor, `A` or `B`, that no site trains in a round; empty: both are trained."""
    return frozen_factor(round_) if config.strategy.rule == "lora-alternate" else ""


def keeps(config: Config) -> str:
    """The settings that make a site keep something across rounds; empty if none does."""
    settings = {
        "payload.personal": config.payload.personal,
        "strategy.rule='lora-share-a'": config.strategy.rule == "lora-share-a",
        "train.ditto-lambda": config.train.ditto_lambda > 0,
        "train.correction='scaffold'": config.train.correction == "scaffold",
    }
    return ", ".join(name for name, on in settings.items() if on)


def stores(config: Config) -> str:
    """The settings that make a site write something to its folder; empty if none does."""
    masks = config.secure.aggregation == "masks"
    secure = "secure.aggregation='masks'" if masks else ""
    return ", ".join(filter(None, [keeps(config), secure]))


def weight(config: Config, rows: int) -> int:
    """What a site with that many training rows counts for."""
    return 1 if config.strategy.weighting == "uniform" else min(rows, config.strategy.weight_cap)


def exchange(
    config: Config, layout: Layout, run: str, spool: Path, server: SplitServer | None = None
) -> Exchange | None:
    """How updates get to the server of a run; None: as they are."""
    if server:
        return SplitExchange(server, Plain(config.strategy, layout, spool))
    if not config.secure.on:
        return None
    norm, seed = config.strategy.max_update_norm, config.run.seed
    if config.secure.aggregation == "ckks":
        return Encrypted(config.secure, layout, run, config.digest, seed, norm)
    return Masks(config.secure, layout, run, config.digest, seed, norm, clientlevel.shares(config))


def split_server(config: Config, loaded: Base, sites: int, known: str) -> SplitServer | None:
    """The middle of a split model at the server, listening; None for a whole model.

    `known` is the schedule that a run to resume has picked.
    """
    if not isinstance(loaded, SplitBase):
        return None
    return SplitServer(config, loaded, Sharing(config, loaded, sites, known))


def travelling(config: Config, payload: Payload) -> Layout:
    """Layout of what travels: the payload's shared part, and SCAFFOLD's control variates."""
    scaffold = config.train.correction == "scaffold"
    return control.with_controls(payload.layout) if scaffold else payload.layout


def started(config: Config, payload: Payload) -> dict[str, Tensor]:
    """What the server sends out first."""
    shared = payload.select()
    scaffold = config.train.correction == "scaffold"
    return control.joined(shared, control.started(shared)) if scaffold else shared


def model_key(config: Config, path: str) -> str:
    """What decides the weights and wrappers of a resident model, as a cache key."""
    parts = [config.model.model_dump_json(), config.payload.model_dump_json()]
    if config.model.task == "classification":  # whose classes may be counted in the data
        parts.append(config.data.model_dump_json())
    parts += [personal(config), _frozen(config)]
    parts += [config.train.packing, config.privacy.unit, config.split.model_dump_json()]
    return "\n".join([*parts, str(config.run.seed), path])


def load_base(config: Config, path: str = "", *, at_site: bool = False) -> Base:
    """Read the base model from disk, or one side's parts of it."""
    common: Any = {
        "path": path,
        "num_labels": num_labels(config),
        "seed": derive(config.run.seed, "base"),
    }
    if config.payload.kind == "split":
        wanted = SITE if at_site else SERVER
        return split.load(config.model, config.payload, config.split, wanted, **common)
    return base.load(config.model, **common)


def attach(config: Config, loaded: Base) -> Payload:
    """Attach the configured payload to a base model, with seeded start values."""
    if isinstance(loaded, SplitBase):
        return split.attach(loaded, personal(config), _frozen(config))
    return payload.attach(
        loaded.model,
        config.payload.model_copy(update={"personal": personal(config)}),
        tokenizer=loaded.tokenizer,
        task=config.model.task,
        fresh_modules=loaded.fresh_modules,
        frozen=_frozen(config),
        seed=derive(config.run.seed, "payload"),
    )


def packs(config: Config, loaded: Base) -> bool:
    """Whether to pack documents, which must not see each other; prepares the model for it.

    Raises ConfigError when packing is demanded of a model that cannot.
    """
    wanted = config.train.packing
    kind = config.payload.kind
    possible = config.model.task == "causal-lm" and kind != "split" and not prompting(kind)
    possible = possible and config.privacy.unit != "record"
    if wanted == "off" or not possible:
        return False
    able = attention.enable(loaded.model)
    if wanted == "on" and not able:
        raise ConfigError(
            f"Expected a model whose attention can be kept within documents, got a "
            f"{type(loaded.model).__name__}; set train.packing='off'."
        )
    return able


def metric(config: Config) -> str:
    """Name of the task's metric."""
    return "accuracy" if config.data.format in ("classification", "choice") else "perplexity"
