"""Rules that know LoRA: what becomes of the factors A and B, and of their products.

Averaging A and B apart is not averaging the products B A that the sites have trained; the rules
differ in what they do about it. Shape suffixes as in `product`. Products are without LoRA's scale
alpha / rank. None of these rules is robust: breakdown point 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.layout import Layout
from models.section import ConfigError
from strategies.cohort import Cohort, CohortError, Delta, LazyRows
from strategies.product import Pair, side, stacked, structure
from strategies.rules import mean, summed
from strategies.stage import Rule, Stage, State, pure

# Rules by products, to which a site of a lower rank is one whose other components are zero.
_RANKED = ("lora-exact", "lora-stack", "lora-svd")
_FOLDING = ("lora-exact", "lora-stack")
_PAIRED = ("lora-mean", "lora-exact", "lora-stack", "lora-svd", "lora-alternate")


def lora_mean() -> Rule:
    """Weighted means of A and of B, apart, as `mean` does; its product is not the mean of products.

    The usual way (FedIT, Zhang et al. 2024): A = sum of w A_i, B = sum of w B_i. Breakdown point 0:
    one site can move it anywhere within the gate's bound. O(N D) time.
    """

    def apply(cohort: Cohort) -> Delta:
        check_layout("lora-mean", cohort.layout)
        return _averaged(cohort, "lora-mean")

    return Stage("lora-mean", Cohort, Delta, pure(apply), proves=mean().proves)


def lora_exact() -> Rule:
    """Means of A and of B, and what their product lacks goes into the frozen weights.

    FedEx-LoRA (Singhal et al. 2025): the residual is mean(B A) - mean(B) mean(A), added to W, so
    that the model moves by mean(B A). Breakdown point 0, as the mean's. Here the residual has
    (N - 1) R columns of factors: with H an orthonormal basis of what is orthogonal to sqrt(w), it
    is sum_j b_j a_j for b_j = sum_i H_ji sqrt(w_i) B_i and a_j alike. Exact to the rounding of
    float32. O(N^2 D) time, memory of one module of N deltas. A stage before it that judges products
    is refused: a liar who sends (k A, B / k) would choose the scale of the factors that all train
    on; `lora-svd` sets it anew.
    """

    def apply(cohort: Cohort) -> Delta:
        pairs, (rows, shares) = _pairs(cohort, "lora-exact"), terms(cohort)
        delta = _averaged(cohort, "lora-exact")
        mix = _residual_mix(shares)
        fold = {pair.module: _residual(pair, rows, mix) for pair in pairs}
        return replace(delta, fold=fold)

    return Stage("lora-exact", Cohort, Delta, pure(apply))


def lora_stack() -> Rule:
    """The mean of products goes into the frozen weights, and A and B start anew.

    FLoRA (Wang et al. 2024): W + sum over sites of w B A, as N R columns of stacked factors.
    Breakdown point 0, as the mean's.
    A is drawn again as PEFT draws it (uniform within 1 / sqrt(I)), B is zero; for embeddings, as
    PEFT has it, A is zero and B normal. O(N D) time, memory of one module of N deltas.
    """

    def apply(state: State, cohort: Cohort, generator: torch.Generator) -> tuple[Delta, State]:
        pairs, (rows, shares) = _pairs(cohort, "lora-stack"), terms(cohort)
        delta = summed(cohort)  # whose factors are replaced below
        fold = {pair.module: _stack(pair, cohort.base_D, rows, shares) for pair in pairs}
        for pair in pairs:
            (a, b), (base_a, base_b) = pair.factors(delta.vector_D), pair.factors(cohort.base_D)
            fresh_a, fresh_b = _start(pair, generator)
            a.copy_(fresh_a - base_a)
            b.copy_(fresh_b - base_b)
        return replace(delta, fold=fold), state

    return Stage("lora-stack", Cohort, Delta, apply)


def lora_freeze_a() -> Rule:
    """Weighted mean of B (and heads), while A stays at its seeded start and does not travel.

    FFA-LoRA (Sun et al. 2024): with one A for all, (sum of w B_i) A is the mean of
    products. Where A is in the layout all the same it stays as it is. Breakdown point 0, as the
    mean's. O(N D) time.
    """

    def apply(cohort: Cohort) -> Delta:
        check_layout("lora-freeze-a", cohort.layout)
        return _held(_averaged(cohort, "lora-freeze-a"), "A")

    def holds(state: State, layout: Layout) -> frozenset[str]:
        return _factors(layout, "A")

    proves = mean().proves
    return Stage("lora-freeze-a", Cohort, Delta, pure(apply), proves=proves, holds=holds)


def lora_alternate() -> Rule:
    """Weighted mean of B in odd rounds and of A in even ones; the other factor stays as it is.

    RoLoRA (Chen et al. 2025): with one factor the same for all, the product of means is the mean of
    products. Breakdown point 0, as the mean's. O(N D) time.
    """

    def init(size: int) -> State:
        return {"rounds": torch.zeros((), dtype=torch.int64)}

    def apply(state: State, cohort: Cohort, generator: torch.Generator) -> tuple[Delta, State]:
        check_layout("lora-alternate", cohort.layout)
        rounds = state["rounds"] + 1
        averaged = _averaged(cohort, "lora-alternate")
        return _held(averaged, frozen_factor(int(rounds))), {"rounds": rounds}

    def holds(state: State, layout: Layout) -> frozenset[str]:
        return _factors(layout, frozen_factor(int(state["rounds"]) + 1))

    return Stage("lora-alternate", Cohort, Delta, apply, init, mean().proves, holds=holds)


def lora_share_a() -> Rule:
    """Weighted mean of A (and heads), while each site trains a B of its own.

    FedSA-LoRA (Guo et al. 2025): what A learns is general, what B learns a site's own. In a run
    the rule makes `lora_B` personal (`payload.personal`), so that B neither travels nor is reset at
    the sites; where B is in the layout all the same it stays as it is. Breakdown point 0, as the
    mean's. O(N D) time.
    """

    def apply(cohort: Cohort) -> Delta:
        if not any(side(name) == "A" for name in cohort.layout.names):
            raise _misfit("lora-share-a", "no factor A")
        return _held(_averaged(cohort, "lora-share-a"), "B")

    def holds(state: State, layout: Layout) -> frozenset[str]:
        return _factors(layout, "B")

    return Stage("lora-share-a", Cohort, Delta, pure(apply), proves=mean().proves, holds=holds)


def frozen_factor(round_: int) -> str:
    """The factor, `A` or `B`, that `lora-alternate` holds still in a round, counted from 1."""
    return "A" if round_ % 2 else "B"


def check_layout(rule: str, layout: Layout) -> None:
    """Refuse a payload that a rule for LoRA cannot aggregate; raises ConfigError."""
    names, pairs = layout.names, structure(layout).pairs
    if rule == "lora-freeze-a" and not any(".lora_B." in name for name in names):
        raise _misfit(rule, "no factor B")
    if rule == "lora-freeze-a" and any(".lora_embedding_B" in name for name in names):
        raise ConfigError(
            "Expected no embedding among the modules with strategy.rule='lora-freeze-a', got one, "
            "whose factor A starts, and would stay, at zero; leave it out of "
            "payload.target-modules."
        )
    if rule in _PAIRED and not pairs:
        raise _misfit(rule, "no pair of them")
    if rule not in _FOLDING:
        return
    if odd := [name for name in names if "lora_magnitude_vector" in name]:
        raise ConfigError(
            f"Expected LoRA's plain product for strategy.rule={rule!r}, got {odd[0]!r} of DoRA, "
            "which scales the frozen weight too; take 'use_dora' out of payload.options, or set "
            "strategy.rule='lora-mean'."
        )
    paired = {name for pair in pairs for name in (pair.a, pair.b)}
    if odd := [name for name in names if ".lora_A." in name and name not in paired]:
        raise ConfigError(
            f"Expected factors of linear and embedding layers for strategy.rule={rule!r}, got "
            f"{odd[0]!r}; leave that module out of payload.target-modules."
        )


def check_ranks(rule: str, ranks: str) -> None:
    """Refuse sites of a lower rank under a rule that averages factors; raises ConfigError."""
    if rule not in _RANKED:
        raise ConfigError(
            f"Expected strategy.rule of {', '.join(_RANKED)} with {ranks}, got {rule!r}, which "
            "averages components that some sites lack; pick one of these, or let all sites have "
            "payload.rank."
        )


def terms(cohort: Cohort) -> tuple[Sequence[Tensor], Tensor]:
    """Updates (D,) and their shares, float64 with sum 1, of which the aggregate is the mean.

    The share of the payload as it was is negative where updates are lengthened, as by `fltrust`.
    Of a mixed cohort these are the sites' own updates: products are averaged, not mixed factors.
    Rows that lie on disk stay there, so that only one module of all sites is in memory at a time.
    """
    rows, shares_N = cohort.source.rows, cohort.coefficients_S
    rest = 1.0 - float(shares_N.sum())
    if abs(rest) > 1e-6:  # a mix that shortens leaves the rest with the payload as it was
        own, still_D = rows, torch.zeros(cohort.layout.size)
        rows = LazyRows(len(own) + 1, lambda i: own[i] if i < len(own) else still_D)
        shares_N = torch.cat([shares_N, torch.tensor([rest], dtype=torch.float64)])
    return rows, shares_N.div_(shares_N.sum())


def _averaged(cohort: Cohort, rule: str) -> Delta:
    if cohort.judged and structure(cohort.layout).pairs:
        raise CohortError(
            f"Expected updates whose products B A nothing has judged for {rule}, which adds A and "
            "B up apart, got some that passed as products, whatever the scale of their factors; "
            "leave out the stage that judges (strategy.pre), or set strategy.rule='lora-svd'."
        )
    return summed(cohort)


def _held(delta: Delta, factor: str) -> Delta:
    """`delta` with zeros for one factor, whether it is of a pair or not."""
    parts, still = delta.layout.unflatten(delta.vector_D), _factors(delta.layout, factor)
    held = {name: torch.zeros_like(part) if name in still else part for name, part in parts.items()}
    return replace(delta, vector_D=delta.layout.flatten(held))


def _factors(layout: Layout, factor: str) -> frozenset[str]:
    return frozenset(name for name in layout.names if side(name) == factor)


def _pairs(cohort: Cohort, rule: str) -> tuple[Pair, ...]:
    check_layout(rule, cohort.layout)
    return structure(cohort.layout).pairs


def _misfit(rule: str, got: str) -> ConfigError:
    return ConfigError(
        f"Expected LoRA factors A and B in the payload with strategy.rule={rule!r}, got {got}; set "
        "payload.kind='lora' or strategy.rule='mean'."
    )


def _residual_mix(shares_N: Tensor) -> Tensor:
    """H diag(sqrt(w)), shape (N - 1, N): H has orthonormal rows orthogonal to sqrt(w)."""
    if bool((shares_N < 0).any()):
        raise CohortError(
            "Expected averages of the sites' updates for lora-exact, got a negative coefficient; "
            "leave out the stage before it (strategy.pre), or set strategy.rule='lora-svd'."
        )
    root = shares_N.sqrt()
    basis, _ = torch.linalg.qr(root[:, None], mode="complete")
    mix: Tensor = basis[:, 1:].T * root
    return mix


def _residual(pair: Pair, rows: Sequence[Tensor], mix: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of mean(B A) - mean(B) mean(A), in which the base cancels."""
    factors = [pair.factors(row) for row in rows]
    a = torch.stack([a for a, _ in factors]).double()
    b = torch.stack([b for _, b in factors]).double()
    right = torch.einsum("jn,nri->jri", mix, a).reshape(-1, pair.fan_in)
    left = torch.einsum("jn,nor->ojr", mix, b).reshape(pair.fan_out, -1)
    return left.float(), right.float()


def _stack(
    pair: Pair, base_D: Tensor, rows: Sequence[Tensor], shares_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of mean(B A)."""
    base_a, base_b = pair.factors(base_D)
    moved = [pair.factors(row) for row in rows]
    return stacked([(base_a + a, base_b + b) for a, b in moved], shares_N.tolist())


def _start(pair: Pair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) as PEFT starts them."""
    a, b = torch.zeros(pair.rank, pair.fan_in), torch.zeros(pair.fan_out, pair.rank)
    if "lora_embedding_A" in pair.a:
        return a, b.normal_(generator=generator)
    # Kaiming's uniform start with a = sqrt(5), as linear layers have it.
    bound = 1.0 / math.sqrt(pair.fan_in)
    return a.uniform_(-bound, bound, generator=generator), b
