"""Whole numbers with a scale per token: hidden states to the nearest, gradients without bias.

Why gradients have no error feedback (Seide et al. 2014; Karimireddy et al. 2019): it adds what one
rounding lost to the next gradient *of the same parameters*. Here the next gradient is of other
rows' activations: a weight's gradient is the sum over tokens of activation times gradient, and a
residual that meets another activation is an error, not its correction. Carried over by position or
by hidden column it made the weights' gradients worse a hundredfold and more, since gradients of
tokens differ by orders of magnitude. Keeping it for each row of the data would be right (as AQ-SGD
does with activations, Wang et al. 2022), but takes memory for every token of a site.

Rounding up or down at random, so that the mean is the value (QSGD, Alistarh et al. 2017, section
3.1), does the same by another way: a weight's gradient is linear in what is rounded, so that its
error has mean zero and averages out over steps, at up to twice the standard deviation of one step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.wire import WireError


def rounded(values: Tensor, bits: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Whole numbers (int8) and the scale of each token (bfloat16) that they are multiples of.

    To the nearest, or without bias where a `generator` is given. Raises WireError for values that
    are not finite or too large.
    """
    top = 2 ** (bits - 1) - 1
    scales = _scales(values, top)
    steps = values / scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    if generator is not None:
        # Drawn on the CPU, so that the same seed rounds the same way wherever the values are.
        steps = (steps + torch.rand(steps.shape, generator=generator).to(steps)).floor()
    return steps.round().clamp(-top, top).to(torch.int8), scales


def _scales(values: Tensor, top: int) -> Tensor:
    largest = values.abs().amax(-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise WireError("Expected finite hidden states to send, got NaN or Inf.")
    # As bfloat16, whose range gradients need, and rounded up, so that the largest value fits.
    scales = ((largest / top).view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)
    if not bool((scales * top).isfinite().all()):
        raise WireError("Expected hidden states within the range of bfloat16, got larger ones.")
    return scales.to(torch.bfloat16)
