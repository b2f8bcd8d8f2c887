"""SCAFFOLD's control variates (Karimireddy et al. 2020, Algorithm 1), which travel with a payload.

For each tensor of the payload there is one more, `control/<name>`, of the same shape: the server's
c on the way down, the change of the site's c_i on the way up. Gate and rules see them as tensors
like any other. Server and sites begin with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from models.layout import CONTROL, Layout
from strategies.cohort import Delta

Tensors = dict[str, Tensor]


def with_controls(layout: Layout) -> Layout:
    """Layout of a payload and its control variates."""
    names = tuple(CONTROL + name for name in layout.names)
    return replace(layout, names=layout.names + names, shapes=layout.shapes * 2)


def joined(payload: Mapping[str, Tensor], control: Mapping[str, Tensor]) -> Tensors:
    """Payload and control variates, both by the payload's names, as they travel."""
    return {**payload, **{CONTROL + name: control[name] for name in payload}}


def parted(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """The inverse of `joined`; the second part is empty where no control variates travel."""
    payload = {n: tensor for n, tensor in tensors.items() if not n.startswith(CONTROL)}
    control = {
        n.removeprefix(CONTROL): tensor for n, tensor in tensors.items() if n.startswith(CONTROL)
    }
    return payload, control


def started(payload: Mapping[str, Tensor]) -> Tensors:
    """Control variates of zeros."""
    return {name: torch.zeros_like(tensor) for name, tensor in payload.items()}


def shift(own: Mapping[str, Tensor], control: Mapping[str, Tensor]) -> Tensors:
    """What a site adds to its gradients: c - c_i (equation 3)."""
    return {name: control[name] - own[name] for name in own}


def renewed(
    own: Mapping[str, Tensor],
    control: Mapping[str, Tensor],
    delta: Mapping[str, Tensor],
    travelled: float,
) -> Tensors:
    """The site's next control variate, option II: c_i+ = c_i - c + (x - y_i) / (K * eta).

    `delta` is y_i - x, `travelled` the number of local steps times their learning rate, K * eta.
    """
    return {name: own[name] - control[name] - delta[name] / travelled for name in own}


def damped(delta: Delta, share: float) -> Delta:
    """The aggregate with its control part times |S| / N: c moves by the mean over all N sites.

    A layout without control variates comes back as it is.
    """
    names, shapes = delta.layout.names, delta.layout.shapes
    if share == 1.0 or not any(name.startswith(CONTROL) for name in names):
        return delta
    vector_D = delta.vector_D.clone()
    for name, part in zip(names, vector_D.split([prod(s) for s in shapes]), strict=True):
        if name.startswith(CONTROL):
            part.mul_(share)
    return replace(delta, vector_D=vector_D)
