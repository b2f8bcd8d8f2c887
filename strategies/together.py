"""Which stages go together, by their names: refused before a run starts what would not hold in it.

Robust stages judge LoRA's factors by their products B A, so that (k A, B / k) of an honest update
is an honest update to them. What adds A and B up apart after such a stage would believe any k.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.section import ConfigError

# Stages before the rule that judge updates by the products of LoRA's factors.
JUDGING = (
    "module-screen",
    "nnm",
    "krum",
    "multi-krum",
    "geometric-median",
    "fltrust",
    "foolsgold",
)
# Those of them that say what each site counts for.
WEIGHING = ("geometric-median", "fltrust", "foolsgold")
# Stages that make one row of the updates of several sites.
_MIXING = ("nnm", "bucketing")
# Rules by coordinate, which take A and B apart.
_BY_COORDINATE = ("median", "trimmed-mean", "bulyan")
# Stages and rules to which rows count alike, or that weigh them anew.
UNWEIGHTED = (
    *_BY_COORDINATE, *_MIXING, *WEIGHING, "krum", "multi-krum", "centered-clipping",
)  # fmt: skip
# Rules for LoRA that add A and B up apart, to the bit.
_APART = ("lora-mean", "lora-exact", "lora-alternate")
# Rules that add A and B up apart unless a stage before them has judged products.
_MEANS = ("mean", "norm-bounding")
# A server optimiser would move what these rules set, or hold still, exactly.
_EXACT = ("lora-exact", "lora-stack", "lora-alternate")
_RAW = (*_BY_COORDINATE, "lora-mean", "lora-alternate", "lora-freeze-a", "lora-share-a")


def judged(pre: Sequence[str]) -> bool:
    """Whether a stage before the rule judges products."""
    return any(name in JUDGING for name in pre)


def by_products(rule: str, pre: Sequence[str]) -> bool:
    """Whether products count after the stages before the rule: judged there, or added up by it."""
    return judged(pre) or rule not in (*_MEANS, *_RAW)


def compares(rule: str, pre: Sequence[str]) -> bool:
    """Whether something compares updates, in which LoRA's scale weighs products against heads."""
    return judged((*pre, rule)) or rule in ("bulyan", "centered-clipping")


def check(rule: str, pre: Sequence[str], server_optimizer: str) -> None:
    """Refuse stages that do not fit whatever the payload is; raises ConfigError."""
    if "module-screen" in pre[1:]:
        raise ConfigError(
            f"Expected 'module-screen' first in strategy.pre, got {','.join(pre)!r}; put it first, "
            "since it compares the modules of single sites and names those that it leaves out."
        )
    _check_weights((*pre, rule))
    if rule in _APART and judged(pre):
        raise ConfigError(
            f"Expected no stage that judges products B A before strategy.rule={rule!r}, got "
            f"strategy.pre={','.join(pre)!r}: it takes (k A, B / k) for what it multiplies to, and "
            "the rule adds A and B up apart, so that a liar would choose their scale; set "
            "strategy.rule='lora-svd', or leave that stage out."
        )
    if rule in _EXACT and server_optimizer != "none":
        raise ConfigError(
            f"Expected strategy.server-optimizer='none' with strategy.rule={rule!r}, got "
            f"{server_optimizer!r}, which would move the factors away from what is exact; set it "
            "to 'none', or pick strategy.rule='lora-mean'."
        )


def _check_weights(names: Sequence[str]) -> None:
    weigher = next((name for name in names if name in WEIGHING), "")
    after = names[names.index(weigher) + 1 :] if weigher else ()
    if odd := next((name for name in after if name in UNWEIGHTED), None):
        raise ConfigError(
            f"Expected what minds weights after {weigher!r} in strategy.pre, got {odd!r}, to which "
            f"they are nothing, so that {weigher!r} would not count; set strategy.rule="
            f"{weigher!r}, or let strategy.rule='mean' or 'lora-svd' follow it."
        )


def check_personal(rule: str, pre: Sequence[str]) -> None:
    """Refuse what turns LoRA factors anew under personal models near them; raises ConfigError."""
    if by_products(rule, pre):
        raise ConfigError(
            "Expected factors that stay comparable from round to round with train.ditto-lambda, "
            f"got {'+'.join((*pre, rule))}, which sets them, or the frozen weights, anew in each "
            "round, so that personal models would be pulled to their turning; set strategy.rule="
            "'mean' or 'lora-mean' and strategy.pre='', or train.ditto-lambda=0."
        )


def check_factors(rule: str, pre: Sequence[str], server_optimizer: str) -> None:
    """Refuse what does not fit a payload with pairs of LoRA factors; raises ConfigError."""
    if rule in _BY_COORDINATE and judged(pre) and any(name in _MIXING for name in pre):
        raise ConfigError(
            f"Expected updates of single sites for strategy.rule={rule!r} with LoRA factors, got "
            f"strategy.pre={','.join(pre)!r}, which judges products B A and mixes A and B apart, "
            "so that a liar's (k A, B / k) enters many rows; set strategy.rule='geometric-median', "
            "'multi-krum' or 'lora-svd', or leave that stage out."
        )
    if rule == "median" and judged(pre):
        raise ConfigError(
            "Expected no stage that judges products B A before strategy.rule='median' with LoRA "
            f"factors, got strategy.pre={','.join(pre)!r}: it takes (k A, B / k) for what it "
            "multiplies to, so that liars may be most of those that it keeps; set "
            "strategy.rule='trimmed-mean' or 'geometric-median', or leave that stage out."
        )
    if by_products(rule, pre) and rule not in _RAW and server_optimizer != "none":
        chain = "+".join((*pre, rule))
        raise ConfigError(
            f"Expected strategy.server-optimizer='none' with LoRA factors and {chain}, got "
            f"{server_optimizer!r}: products are cut into new factors in each round, so that what "
            "it would scale and remember is mostly their turning; set it to 'none', or average "
            "factors with strategy.rule='mean' and strategy.pre=''."
        )
