"""Names of rules and stages, and the chain that a configuration describes.

To add one, write a factory with typed keyword-only options and give it a line here. An option
`x` of a rule or a stage before it is the key `strategy.x` of the configuration, an option of a
server optimiser is `strategy.server-x`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias, TypeVar

from pydantic import ConfigDict, ValidationError, validate_call

from models.section import ConfigError, unknown
from strategies import (
    combine,
    coordinates,
    lora,
    preaggregation,
    rules,
    server_optimizers,
    together,
    trust,
    weighers,
)
from strategies.bulyan import bulyan
from strategies.centered_clipping import centered_clipping
from strategies.config import StrategyConfig
from strategies.screening import module_screen
from strategies.stage import Post, Pre, Rule, chain

S = TypeVar("S")
# Options differ from factory to factory; `_make` checks them against each one's signature.
Factory: TypeAlias = Callable[..., S]

# Stages that choose or weigh updates: rules, or before a rule of another kind.
WEIGHERS: Mapping[str, Factory[Pre]] = MappingProxyType(
    {
        "krum": weighers.krum,
        "multi-krum": weighers.multi_krum,
        "geometric-median": weighers.geometric_median,
        "fltrust": trust.fltrust,
        "foolsgold": trust.foolsgold,
    }
)
PRE: Mapping[str, Factory[Pre]] = MappingProxyType(
    {
        "clip": rules.clip,
        "module-screen": module_screen,
        "nnm": preaggregation.nnm,
        "bucketing": preaggregation.bucketing,
        **WEIGHERS,
    }
)
RULES: Mapping[str, Factory[Rule]] = MappingProxyType(
    {
        "mean": rules.mean,
        "norm-bounding": rules.norm_bounding,
        "median": coordinates.median,
        "trimmed-mean": coordinates.trimmed_mean,
        "bulyan": bulyan,
        "lora-mean": lora.lora_mean,
        "lora-exact": lora.lora_exact,
        "lora-stack": lora.lora_stack,
        "lora-svd": combine.lora_svd,
        "lora-freeze-a": lora.lora_freeze_a,
        "lora-alternate": lora.lora_alternate,
        "lora-share-a": lora.lora_share_a,
        **{name: weighers.closing(factory) for name, factory in WEIGHERS.items()},
        "centered-clipping": centered_clipping,
    }
)
SERVER_OPTIMIZERS: Mapping[str, Factory[Post]] = MappingProxyType(
    {
        "none": server_optimizers.none,
        "momentum": server_optimizers.momentum,
        "adam": server_optimizers.adam,
        "yogi": server_optimizers.yogi,
        "adagrad": server_optimizers.adagrad,
    }
)


def build(config: StrategyConfig, around: Callable[[Rule], Rule] | None = None) -> Rule:
    """The chain that `strategy.*` describes; raises ConfigError for a name that is not known.

    `around` wraps what comes before the server optimiser, such as in a mechanism with noise.
    """
    pre = split_names(config.pre)
    known = options_of(config.rule, pre, config.server_optimizer)
    options = {name: getattr(config, name) for name in known if name in type(config).model_fields}
    return compose(config.rule, pre, config.server_optimizer, options, around)


def compose(
    rule: str,
    pre: Sequence[str] = (),
    server_optimizer: str = "none",
    options: Mapping[str, object] = MappingProxyType({}),
    around: Callable[[Rule], Rule] | None = None,
) -> Rule:
    """Chain stages by name, each taking its options by name; raises ConfigError.

    Raises for an unknown name or option (listing the choices), and for a missing or wrong option.
    """
    known = options_of(rule, pre, server_optimizer)
    if odd := next((name for name in options if name not in known), None):
        stages = ", ".join((*pre, rule, server_optimizer))
        if not known:
            raise ConfigError(f"Expected no options for {stages}, got {odd!r}; leave it out.")
        raise unknown(f"option of {stages}:", odd, known)
    optimizer = _pick("strategy.server-optimizer", server_optimizer, SERVER_OPTIMIZERS)
    together.check(rule, pre, server_optimizer)
    known_pre = dict(PRE)
    if together.by_products(rule, pre):
        known_pre["clip"] = rules.clip_products
    before: list[Pre | Rule] = [
        *(_make(_pick("strategy.pre", name, known_pre), options) for name in pre),
        _make(_pick("strategy.rule", rule, RULES), options),
    ]
    post = _make(optimizer, options, prefix="server_")
    return chain(around(chain(*before)), post) if around else chain(*before, post)


def split_names(listed: str) -> tuple[str, ...]:
    """Names in a comma-separated list, in order; empty for an empty list."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def options_of(rule: str, pre: Sequence[str] = (), server_optimizer: str = "none") -> set[str]:
    """Names of the options that these stages take; raises ConfigError for an unknown stage."""
    factories = [_pick("strategy.pre", name, PRE) for name in pre]
    taken = {
        name
        for factory in [*factories, _pick("strategy.rule", rule, RULES)]
        for name in inspect.signature(factory).parameters
    }
    optimizer = _pick("strategy.server-optimizer", server_optimizer, SERVER_OPTIMIZERS)
    return taken | {f"server_{name}" for name in inspect.signature(optimizer).parameters}


def _pick(what: str, name: str, choices: Mapping[str, Factory[S]]) -> Factory[S]:
    if name not in choices:
        raise unknown(what, name, choices)
    return choices[name]


def _make(factory: Factory[S], options: Mapping[str, object], prefix: str = "") -> S:
    names = inspect.signature(factory).parameters
    given = {name: options[prefix + name] for name in names if prefix + name in options}
    try:
        return validate_call(config=ConfigDict(strict=True))(factory)(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = prefix + str(first["loc"][0])
        if first["type"] == "missing_keyword_only_argument":
            raise ConfigError(
                f"Expected the option {option!r}, which is missing; set it."
            ) from None
        raise ConfigError(
            f"Expected a valid {option}, got {first['input']!r}: {first['msg']}."
        ) from None
