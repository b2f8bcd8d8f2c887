"""Closing a chain of linear stages: the weighted sum of updates, of LoRA factors by their product.

Shape suffixes: N sites, S rows of the cohort's source, D parameters, R rank.
"""

from __future__ import annotations

from torch import Tensor

from models.section import ConfigError
from strategies.cohort import Cohort, Delta
from strategies.mixing import weighted_sum
from strategies.product import Pair, stacked, structure, truncated
from strategies.stage import Rule, Stage, pure


def combine() -> Rule:
    """Weighted sum of the updates, which ends rules that are linear in them, such as Krum.

    Plain layouts: the weighted mean, O(N D), two rows in memory. Layouts with LoRA factors: each
    module's sum of products, cut to the rank of the payload by SVD as in `lora-svd`, even for one
    chosen site, which could have sent (kA, B/k). Breakdown point 0 by itself.
    """
    return Stage("combine", Cohort, Delta, pure(combined))


def lora_svd() -> Rule:
    """FlexLoRA (Bai et al. 2024, section 3.2): average the products B A, truncated SVD to rank R.

    Exact to float32 rounding where the mean of the products has a rank of at most R; otherwise the
    best approximation of that rank (Eckart-Young). Tensors without a LoRA partner: weighted mean.
    Breakdown point 0: one site can move it anywhere within the gate's bound. Costs
    O((I + O) (N R)^2) a module, or O(I O min(I, O)) where N R is larger than the module.
    Raises ConfigError for a layout without pairs of factors.
    """

    def apply(cohort: Cohort) -> Delta:
        if not structure(cohort.layout).pairs:
            raise ConfigError(
                "Expected LoRA factors A and B in the payload with strategy.rule='lora-svd', got "
                "none; set payload.kind='lora' or strategy.rule='mean'."
            )
        return combined(cohort)

    return Stage("lora-svd", Cohort, Delta, pure(apply))


def combined(cohort: Cohort) -> Delta:
    """The weighted sum of a cohort's updates, relative to the base; products for LoRA factors."""
    source, coefficients_S = cohort.source, cohort.coefficients_S
    found = structure(cohort.layout)
    total_D = weighted_sum(source.rows, coefficients_S.tolist(), cohort.layout.size)
    for pair in found.pairs:
        a, b = _averaged(pair, source, coefficients_S)
        base_a, base_b = pair.factors(cohort.base_D)
        delta_a, delta_b = pair.factors(total_D)
        delta_a.copy_(a - base_a)
        delta_b.copy_(b - base_b)
    return Delta(total_D, cohort.layout)


def _averaged(pair: Pair, source: Cohort, coefficients_S: Tensor) -> tuple[Tensor, Tensor]:
    """Factors A (R, I), B (O, R) of B_0 A_0 + sum of c_i (B_i A_i - B_0 A_0), cut to rank R."""
    base = pair.factors(source.base_D.double())
    factors = [base]
    weights = [1.0 - float(coefficients_S.sum())]
    for index in coefficients_S.nonzero().flatten().tolist():
        delta_a, delta_b = pair.factors(source.rows[index])
        factors.append((base[0] + delta_a, base[1] + delta_b))
        weights.append(float(coefficients_S[index]))
    left, right = stacked(factors, weights)
    return truncated(left, right, pair.rank)
