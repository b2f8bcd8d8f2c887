"""Ghost clipping in one backward pass: norms of gradients without the gradients themselves.

The gradient of a matrix for one row of a batch is sum_t l_t r_t^T over its T tokens, l and r being
what enters its module and the gradient of what leaves it. So its squared norm is
sum_st (l_s . l_t)(r_s . r_t) (Li et al. 2022, section 4), and the weighted sum over rows is one
matrix product of the same l and r, which are kept until the weights are known (Bu et al. 2023,
book-keeping): no second backward pass. Where the T x T products cost more than the gradient, as
for the thin factors of LoRA, that is materialised instead (Bu et al. 2022, mixed ghost clipping).
Shape suffixes: N rows, T tokens, O and I sides of the matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.payload import Payload
from privacy.persample import Inputs, Measured, PerSampleError, Sums, forward, trained

# Rounding of float32 products, relative to the sum of their sizes: added to squared norms, so that
# where the tokens of a row cancel each other out its norm is over- and never underestimated.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Outer:
    """A use of a matrix: gradients sum_t left_nto right_nti; `left` (N, T) may be row numbers."""

    left: Tensor
    right_NTI: Tensor

    @property
    def looked_up(self) -> bool:
        """Whether `left` holds the numbers of rows that were looked up."""
        return not self.left.is_floating_point()

    def add(self, factors_N: Tensor, total: Tensor) -> None:
        """Add the sum over rows, each times its factor, to `total` of shape (O, I)."""
        right = (self.right_NTI * factors_N[:, None, None]).flatten(0, 1)
        if self.looked_up:
            total.index_add_(0, self.left.flatten(), right.to(total.dtype))
        else:
            total += self.left.flatten(0, 1).T @ right


Use = Outer | Tensor  # or the gradients themselves, (N, ...)


class _Tap(torch.autograd.Function):
    """Hands the gradient of an output to `keep` as soon as it is known, so that none is held.

    All depend on one `anchor`: its gradient, which is zero, takes those of all of them.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        """The output as it is."""
        ctx.keep = keep
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor, Tensor, None]:
        """The slope as it is, and nothing for the anchor."""
        ctx.keep(slopes[0])
        return slopes[0], slopes[0].new_zeros(()), None


class Ghost:
    """Ghost clipping for linear layers and embeddings, shared ones too; others by Opacus."""

    name = "ghost"
    physical: int | None = None

    def __init__(self, payload: Payload, precision: str) -> None:
        self._forward = partial(forward, payload, precision)
        self._parameters = trained(payload)
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._anchor = torch.zeros((), requires_grad=True, device=payload.device)
        self._rows = 0
        self._recording = False
        self._uses: dict[str, list[Use]] = {}
        self._prepared = [
            module
            for module in payload.module.modules()
            if any(id(p) in self._names for p in module.parameters(recurse=False))
        ]
        owned = Counter(id(p) for m in self._prepared for p in m.parameters(recurse=False))
        self._shared = {one for one, modules in owned.items() if modules > 1}
        self._handles: list[RemovableHandle] = []
        try:
            for module in self._prepared:
                # Opacus copies the module, and with a hook on it the whole model.
                if _left_to_opacus(module) and type(module) not in GradSampleHooks.GRAD_SAMPLERS:
                    prepare_layer(module)
        except NotImplementedError as error:
            self.detach()
            raise PerSampleError(f"Opacus cannot copy a layer of this model: {error}") from error
        for module in self._prepared:
            self._handles.append(module.register_forward_hook(self._record, with_kwargs=True))

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        if not self._recording:
            return None
        if len(args) != 1 or kwargs or not isinstance(output, Tensor):
            raise PerSampleError(
                f"Expected modules of one tensor in and one out, got a {type(module).__name__} "
                "with parameters of its own that is none."
            )
        keep = partial(self._keep, module, args[0].detach())
        tapped: Tensor = _Tap.apply(output, self._anchor, keep)  # type: ignore[no-untyped-call]
        return tapped

    def measure(self, inputs: Inputs) -> Measured:
        """Forward and backward over a batch; keeps what the weighted sum is made of."""
        self._uses = {name: [] for name in self._parameters}
        self._rows, self._recording = len(inputs["input_ids"]), True
        try:
            losses = self._forward(inputs)
        finally:
            self._recording = False  # checkpointed parts are computed again in the backward pass
        torch.autograd.grad(losses.sum(), self._anchor, allow_unused=True)
        squares_N = torch.zeros_like(losses, dtype=torch.float32)
        for uses in self._uses.values():
            if uses:  # Others have no gradient. A module that is bypassed fails the self-check.
                squares_N += _squares(uses)
        return Measured(losses.detach(), squares_N.sqrt().detach())

    def _keep(self, module: nn.Module, given: Tensor, slope: Tensor) -> None:
        if len(given) != self._rows or len(slope) != self._rows:
            raise PerSampleError(
                f"Expected every module to compute {self._rows} rows, got {len(slope)} at a "
                f"{type(module).__name__}: it is computed once for several rows."
            )
        for parameter, use in _uses_of(module, given, slope):
            if id(parameter) in self._names:
                uses = self._uses[self._names[id(parameter)]]
                uses.append(use if id(parameter) in self._shared else _thinned(use))

    def add(self, factors: Tensor, sums: Sums) -> None:
        """Add the rows' gradients times their factors, by one product for each use."""
        for name, uses in self._uses.items():
            for use in uses:
                if isinstance(use, Outer):
                    use.add(factors, sums[name])
                else:
                    sums[name] += torch.tensordot(factors, use, 1)
        self._uses = {}

    def detach(self) -> None:
        """Remove the hooks, and what Opacus left on the modules it computed."""
        for handle in self._handles:
            handle.remove()
        for module in self._prepared:
            if "ft_compute_sample_grad" in vars(module):
                del module.ft_compute_sample_grad


def _uses_of(module: nn.Module, given: Tensor, slope: Tensor) -> list[tuple[nn.Parameter, Use]]:
    """The parameters of a module with what their gradients are made of."""
    if isinstance(module, nn.Embedding):
        if module.padding_idx is not None:
            slope = slope * (given != module.padding_idx)[..., None]
        table: nn.Parameter = module.weight  # type: ignore[assignment]
        return [(table, Outer(given.flatten(1), _tokens(slope)))]
    if isinstance(module, nn.Linear) or _transposed(module):
        enters, leaves = _tokens(given), _tokens(slope)
        sides = (enters, leaves) if _transposed(module) else (leaves, enters)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        found: list[tuple[nn.Parameter, Use]] = [(weight, Outer(*sides))]
        if isinstance(bias, nn.Parameter):
            found.append((bias, leaves.sum(1)))
        return found
    sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
    samples = sampler(module, [given], slope)
    return [(parameter, sample.float()) for parameter, sample in samples.items()]


def _left_to_opacus(module: nn.Module) -> bool:
    return not (isinstance(module, nn.Embedding | nn.Linear) or _transposed(module))


def _transposed(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, whose matrix stands the other way."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _tokens(values: Tensor) -> Tensor:
    """As (N, T, width) in float32, in which norm and sum are computed from the same numbers."""
    return values.float().reshape(len(values), -1, values.shape[-1])


def _thinned(use: Use) -> Use:
    """The gradients themselves where that takes fewer operations than products of tokens."""
    if not isinstance(use, Outer) or use.looked_up:
        return use
    out, into, tokens = use.left.shape[2], use.right_NTI.shape[2], use.left.shape[1]
    return use if out * into > tokens * (out + into) else use.left.mT @ use.right_NTI


def _squares(uses: list[Use]) -> Tensor:
    """Squared norms (N,) of the gradients that all uses of a parameter add up to."""
    outers = [use for use in uses if isinstance(use, Outer)]
    given = [use for use in uses if isinstance(use, Tensor)]
    if given and outers:
        raise PerSampleError("Expected a parameter to be used by modules of one kind, got two.")
    if given:
        total = given[0] if len(given) == 1 else torch.stack(given).sum(0)
        return total.flatten(1).square().sum(1)
    squares = torch.zeros(len(outers[0].right_NTI), device=outers[0].right_NTI.device)
    for first, one in enumerate(outers):
        squares += _inner(one, one) + _ROUNDING * _size(one)
        for other in outers[first + 1 :]:
            squares += 2 * _inner(one, other) + 2 * _ROUNDING * (_size(one) * _size(other)).sqrt()
    return squares.clamp(min=0)


def _inner(one: Outer, other: Outer) -> Tensor:
    """Inner products (N,) of the gradients of two uses: sum_st (l_s . l'_t)(r_s . r'_t)."""
    return (_lefts(one, other) * (one.right_NTI @ other.right_NTI.mT)).sum((1, 2))


def _lefts(one: Outer, other: Outer) -> Tensor:
    """Products l_s . l'_t, (N, S, T); a number of a row stands for the unit vector of that row."""
    if one.looked_up and other.looked_up:
        return (one.left[:, :, None] == other.left[:, None, :]).float()
    if one.looked_up:
        return _lefts(other, one).mT
    if other.looked_up:
        rows, tokens, _ = one.left.shape
        return one.left.gather(2, other.left[:, None, :].expand(rows, tokens, -1))
    return one.left @ other.left.mT


def _size(use: Outer) -> Tensor:
    """Squares (N,) of sum_t |l_t| |r_t|, which bounds every sum of products of tokens."""
    sizes: Tensor = use.right_NTI.norm(dim=2)
    if not use.looked_up:
        sizes = sizes * use.left.norm(dim=2)
    squares: Tensor = sizes.sum(1).square()
    return squares
