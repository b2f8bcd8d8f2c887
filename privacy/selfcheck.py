"""Whether per-sample gradients are what they claim to be, for the very model at hand.

A pair of libraries can be wrong in silence: then clipping bounds nothing, and the epsilon that is
reported is false. So before training, the gradients of two records are compared with those of each
record alone, by the model's own loss and without anything attached to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from models.payload import Payload
from models.section import ConfigError
from models.text import IGNORED
from models.train import autocast
from privacy.ghost import Ghost
from privacy.persample import (
    Hooks,
    Inputs,
    Method,
    Microbatch,
    PerSampleError,
    Sums,
    attached,
    empty_sums,
    trained,
)

METHODS: Mapping[str, Callable[..., Method]] = {
    "ghost": Ghost,
    "hooks": Hooks,
    "microbatch": Microbatch,
}


def choose(payload: Payload, wanted: str, task: str, precision: str) -> str:
    """The per-sample method to train with: `wanted`, or with `auto` the fastest that is exact.

    Raises ConfigError when that one, or none, gives the gradients of single records.
    """
    reasons = []
    for name in METHODS if wanted == "auto" else [wanted]:
        try:
            check(payload, METHODS[name], task, precision)
            return name
        except PerSampleError as error:
            reasons.append(f"{name}: {error}")
    raise ConfigError(
        f"Expected per-sample gradients of payload.kind={payload.kind!r} that equal those of "
        f"single records, but they do not ({'; '.join(reasons)}); "
        + ("pick another payload.kind." if wanted == "auto" else "set privacy.per-sample='auto'.")
    )


def check(
    payload: Payload, kind: Callable[..., Method], task: str, precision: str = "float32"
) -> None:
    """Compare a method's gradients of two records with brute force; raises PerSampleError.

    Below float32 a method must take each record alone: the clipped sum is bounded only while no
    record moves the gradients of others. Leaves the payload as it was, and the module in
    evaluation mode.
    """
    rows = _records(payload, task)
    payload.module.train()
    try:
        with _all_gradients_flow(payload), _WithoutDropout():
            expected = [_alone(payload, row, precision) for row in rows]
            lowered = _lowered(payload, precision)
            with attached(payload, kind, precision) as method:
                # Of products in few bits, up to a tenth may be rounding.
                tolerance = 0.1 if lowered else 1e-3
                _compare(payload, method, _padded(rows), expected, tolerance)
                if lowered and method.physical != 1:
                    raise PerSampleError(
                        "Expected train.precision='float32' and an unquantised base model with "
                        "model.dtype='float32' where records share a batch, got fewer bits, whose "
                        "products round by who else is in it: a record would move more than its "
                        "own gradient."
                    )
    except PerSampleError:
        raise
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise PerSampleError(f"it fails: {error}") from error
    finally:
        payload.module.eval()


def weighted(method: Method, inputs: Inputs, factors: Tensor, sums: Sums) -> Tensor:
    """Add sum_i factors_i g_i to `sums`, in batches that the method can take; norms (rows,)."""
    rows = len(factors)
    size = method.physical or rows
    norms = []
    for at in range(0, rows, size):
        part = {name: values[at : at + size] for name, values in inputs.items()}
        norms.append(method.measure(part).norms)
        method.add(factors[at : at + size], sums)
    return torch.cat(norms)


def _lowered(payload: Payload, precision: str) -> bool:
    """Whether anything is computed in fewer bits than float32's."""
    with autocast(precision, payload.device):
        lowered = torch.is_autocast_enabled(payload.device.type)
    return lowered or any(p.dtype != torch.float32 for p in payload.module.parameters())


def _compare(
    payload: Payload,
    method: Method,
    batch: Inputs,
    expected: Sequence[tuple[float, Sums]],
    tolerance: float,
) -> None:
    """Each record's gradient is the weighted sum in which the others weigh nothing."""
    rows = len(expected)
    for row, (norm, gradient) in enumerate(expected):
        factors = functional.one_hot(torch.tensor(row), rows).float().to(payload.device)
        sums = empty_sums(payload)
        norms = weighted(method, batch, factors, sums)
        if not abs(float(norms[row]) - norm) <= tolerance * norm:
            raise PerSampleError(
                f"Expected a gradient of norm {norm:.6g} for record {row + 1} of {rows}, got "
                f"{float(norms[row]):.6g}."
            )
        for name, right in gradient.items():
            apart = float((sums[name] - right).norm())
            if not apart <= tolerance * max(float(right.norm()), tolerance * norm):
                raise PerSampleError(
                    f"Expected the gradient of record {row + 1} of {rows} for {name!r}, got one "
                    f"that is {apart:.3g} away from it, at a norm of {float(right.norm()):.3g}."
                )


def _alone(payload: Payload, row: Inputs, precision: str) -> tuple[float, Sums]:
    """Norm and gradient of one record, by the model's own loss."""
    parameters = trained(payload)
    with autocast(precision, payload.device):
        loss = payload.module(**row).loss
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradient = {
        name: torch.zeros_like(p, dtype=torch.float64) if g is None else g.double()
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }
    return float(torch.stack([g.norm() for g in gradient.values()]).norm()), gradient


def _records(payload: Payload, task: str) -> list[dict[str, Tensor]]:
    """Two made-up records of unequal length, each as a batch of its own."""
    settings = payload.module.config.get_text_config()
    ids = torch.arange(1, 9, device=payload.device) * 7919 % settings.vocab_size
    pad_id = settings.pad_token_id
    ids = torch.where(ids == pad_id, (ids + 1) % settings.vocab_size, ids)
    rows = []
    for number, part in enumerate((ids, ids.flip(0)[:5])):
        row = {"input_ids": part[None], "attention_mask": torch.ones_like(part[None])}
        labels = part.clone()
        labels[: 1 + 2 * number] = IGNORED
        row["labels"] = part.new_tensor([number]) if task == "classification" else labels[None]
        rows.append(row)
    return rows


def _padded(rows: Sequence[Inputs]) -> dict[str, Tensor]:
    longest = max(row["input_ids"].shape[1] for row in rows)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}

    def stretched(name: str, values: Tensor) -> Tensor:
        if values.dim() == 1:
            return values
        return functional.pad(values, (0, longest - values.shape[1]), value=fills[name])

    return {name: torch.cat([stretched(name, row[name]) for row in rows]) for name in rows[0]}


@contextmanager
def _all_gradients_flow(payload: Payload) -> Iterator[None]:
    """Lend values to tensors that begin at zero, behind which gradients vanish; then zero again.

    LoRA's B and the gates of LLaMA-Adapter do: at their start a wrong gradient of A would not show.
    """
    zeros = [p for p in payload.parameters.values() if not bool(p.detach().any())]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zeros:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * drawn)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


class _WithoutDropout(TorchFunctionMode):
    """Training mode without its dropout, which no two passes share."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.dropout:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
