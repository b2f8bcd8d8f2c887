"""Gradients of single records: by Opacus' hooks, by ghost clipping, or one record at a time.

Every method gives the same numbers where it gives any. Which one is right for a model is found out
by `privacy.selfcheck`, never assumed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import Tensor, nn

from models.losses import row_losses
from models.payload import Payload
from models.prompts import prompts_by_row
from models.train import autocast

Inputs = Mapping[str, Tensor]
Sums = dict[str, Tensor]  # by name of the parameter


class PerSampleError(ValueError):
    """Per-sample gradients that a method cannot give for this model."""


@dataclass(frozen=True)
class Measured:
    """The losses of a batch's rows and the L2 norms of their gradients, both of shape (rows,)."""

    losses: Tensor
    norms: Tensor


class Method(Protocol):
    """A way to per-sample gradients, while it is attached to a payload.

    `physical` is the largest number of rows in a batch, None without a limit.
    """

    name: str
    physical: int | None

    def measure(self, inputs: Inputs) -> Measured:
        """Forward and backward over a padded batch; raises PerSampleError where it cannot."""

    def add(self, factors: Tensor, sums: Sums) -> None:
        """Add sum_i factors_i g_i to `sums`, g_i being the gradients of the measured batch."""

    def detach(self) -> None:
        """Take everything off the module that the method attached to it."""


def trained(payload: Payload) -> dict[str, nn.Parameter]:
    """The parameters that take gradients now, by name."""
    return {name: p for name, p in payload.parameters.items() if p.requires_grad}


def empty_sums(payload: Payload) -> Sums:
    """Zeros for every parameter that takes gradients, in float64: the sum of many batches."""
    return {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained(payload).items()}


def forward(payload: Payload, precision: str, inputs: Inputs) -> Tensor:
    """The losses of a batch's rows, with autocast for the forward pass alone."""
    with autocast(precision, payload.device):
        return row_losses(payload.module, inputs)


@contextmanager
def attached(payload: Payload, kind: Callable[..., Method], precision: str) -> Iterator[Method]:
    """A method attached to the payload's module within the block only.

    Raises PerSampleError for a module that it cannot be attached to.
    """
    with prompts_by_row(payload.module), _positions_by_row(payload.module):
        method = kind(payload, precision)
        try:
            yield method
        finally:
            method.detach()


class Microbatch:
    """One record at a time: slow, and right for every model."""

    name = "microbatch"
    physical: int | None = 1

    def __init__(self, payload: Payload, precision: str) -> None:
        self._forward = partial(forward, payload, precision)
        self._parameters = trained(payload)
        self._gradients: Sums = {}

    def measure(self, inputs: Inputs) -> Measured:
        """Forward and backward over one row."""
        losses = self._forward(inputs)
        gradients = torch.autograd.grad(
            losses.sum(), list(self._parameters.values()), allow_unused=True
        )
        found = zip(self._parameters, gradients, strict=True)
        self._gradients = {name: g.float() for name, g in found if g is not None}
        return Measured(losses.detach(), _norm([g[None] for g in self._gradients.values()], losses))

    def add(self, factors: Tensor, sums: Sums) -> None:
        """Add the row's gradient times its factor."""
        for name, gradient in self._gradients.items():
            sums[name] += factors[0] * gradient
        self._gradients = {}

    def detach(self) -> None:
        """Nothing is attached."""


class Hooks:
    """The gradients of all rows of a batch, materialised by Opacus' hooks."""

    name = "hooks"
    physical: int | None = None

    def __init__(self, payload: Payload, precision: str) -> None:
        self._forward = partial(forward, payload, precision)
        self._module = payload.module
        self._parameters = trained(payload)
        try:
            # `strict` refuses any module with a buffer in it, such as that of rotary positions;
            # what really mixes rows is found by the self-check.
            self._hooks = GradSampleHooks(payload.module, loss_reduction="sum", strict=False)
        except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
            raise PerSampleError(f"Opacus cannot hook into this model: {error}") from error
        self._rows = 0

    def measure(self, inputs: Inputs) -> Measured:
        """Forward and backward over a batch, with all gradients kept."""
        self._forget()  # a batch that was measured and not added, to which Opacus would append
        losses = self._forward(inputs)
        self._rows = len(losses)
        with warnings.catch_warnings():  # of layers whose inputs need no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        return Measured(losses.detach(), _norm(list(self._samples().values()), losses))

    def _samples(self) -> Sums:
        found: Sums = {}
        for name, parameter in self._parameters.items():
            parameter.grad = None
            sample = getattr(parameter, "grad_sample", None)
            if sample is None:
                continue  # Not used: without a gradient. A module bypassed fails the self-check.
            if len(sample) != self._rows:
                raise PerSampleError(
                    f"Expected gradients of {self._rows} rows for {name!r}, got {len(sample)}: its "
                    "module is computed once for several rows."
                )
            found[name] = sample.float()
        return found

    def add(self, factors: Tensor, sums: Sums) -> None:
        """Add the rows' gradients times their factors."""
        for name, sample in self._samples().items():
            sums[name] += torch.tensordot(factors, sample, 1)
        self._forget()

    def _forget(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def detach(self) -> None:
        """Remove Opacus' hooks, and what they left on modules and parameters."""
        self._hooks.cleanup()
        for module in self._module.modules():
            for left in ("activations", "max_batch_len", "ft_compute_sample_grad"):
                if left in vars(module):
                    delattr(module, left)


def _norm(samples: list[Tensor], losses: Tensor) -> Tensor:
    squares = torch.zeros_like(losses, dtype=torch.float32)
    for sample in samples:
        squares += sample.flatten(1).square().sum(1)
    return squares.sqrt().detach()


@contextmanager
def _positions_by_row(module: nn.Module) -> Iterator[None]:
    """Let trained embeddings of positions see the positions of every row, not one row for all."""
    rows = 0

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows = len(kwargs["input_ids"])

    def expand(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        if ids.dim() == 2 and len(ids) == 1 < rows:
            return (ids.expand(rows, -1), *args[1:])
        return args

    handles = [module.register_forward_pre_hook(count, with_kwargs=True)]
    for name, inner in module.named_modules():
        wanted = isinstance(inner, nn.Embedding) and inner.weight.requires_grad
        if wanted and "prompt_encoder" not in name:
            handles.append(inner.register_forward_pre_hook(expand))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
