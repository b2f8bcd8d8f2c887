"""What the server adds to frozen weights beside LoRA: computed at the site, saved in the adapter.

The base model stays as it was read. Each module that the fold names gets a frozen branch beside its
factors, which is replaced when another fold comes. Shape suffixes: R rank, K columns of the fold,
I inputs and O outputs of a module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from models.layout import FOLD, FOLD_A, FOLD_B, LayoutError

if TYPE_CHECKING:
    from models.payload import Payload

_ADAPTER = "default"  # PEFT's name for the only adapter
_WRAPPER = "base_model.model."


@dataclass(frozen=True)
class _Branch:
    """Forward hook that adds scale * change(input), from factors or from one matrix (O, I)."""

    factors: tuple[Tensor, ...]
    scale: float
    lookup: bool

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The module's output with the branch's added."""
        first, *rest = self.factors
        if self.lookup:
            change = functional.embedding(inputs[0], first.T)
            stretch = getattr(module.get_base_layer(), "embed_scale", None)  # type: ignore[operator]
            change = change if stretch is None else change * stretch
        else:
            change = functional.linear(inputs[0].to(first.dtype), first)
        for factor in rest:
            change = functional.linear(change, factor)
        return output + (change * self.scale).to(output.dtype)


@dataclass(frozen=True)
class _Adapted:
    """A module with LoRA: its place in the model, its factors' parameters and its scale."""

    name: str
    layer: Any
    a: Tensor
    b: Tensor
    scale: float
    lookup: bool

    @property
    def keys(self) -> tuple[str, str]:
        """Names of A and B in a saved adapter."""
        if self.lookup:
            return f"{self.name}.lora_embedding_A", f"{self.name}.lora_embedding_B"
        return f"{self.name}.lora_A.weight", f"{self.name}.lora_B.weight"


def load(payload: Payload, tensors: Mapping[str, Tensor]) -> None:
    """Load what `strategies.aggregate` returned: the payload, and the fold beside it if any.

    Raises LayoutError for tensors that do not fit the model.
    """
    fold = {n: t for n, t in tensors.items() if n.endswith((FOLD, FOLD_A, FOLD_B))}
    payload.load({name: tensor for name, tensor in tensors.items() if name not in fold})
    replace(payload, fold)


def replace(payload: Payload, fold: Mapping[str, Tensor]) -> None:
    """Let `fold`, and nothing of an earlier one, take effect; empty: the model as it was read.

    Raises LayoutError, before anything has changed, for a fold that does not fit the model.
    """
    branches = [
        (found, _Branch(_on(found, factors), found.scale, found.lookup))
        for found, factors in _fitted(payload, fold)
    ]
    for handle in payload.branches:
        handle.remove()
    handles: list[RemovableHandle] = [
        found.layer.register_forward_hook(branch) for found, branch in branches
    ]
    payload.branches, payload.fold = handles, dict(fold)


def widen(payload: Payload, folder: Path) -> None:
    """Make the PEFT adapter in `folder` one that holds the payload's fold too, at a higher rank.

    Factors stand side by side, A (R + K, I) and B (O, R + K). Where the fold is a matrix, the sum
    of both is taken apart by SVD, at up to min(O, I) components, which is all of it.
    """
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    ranks = {found.name: (found, len(found.a)) for found in _adapted(payload.module)}
    for found, factors in _fitted(payload, payload.fold):
        key_a, key_b = found.keys
        a, b = tensors[key_a], tensors[key_b]
        if len(factors) == 2:
            a, b = torch.cat([a, factors[0]]), torch.cat([b, factors[1]], dim=1)
        else:
            a, b = _apart(b.double() @ a.double() + factors[0].double())
        tensors[key_a], tensors[key_b] = a.contiguous(), b.contiguous()
        ranks[found.name] = found, len(a)
    save_file(tensors, path, metadata={"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text())
    plain = {n.removeprefix(_WRAPPER): (found.scale, rank) for n, (found, rank) in ranks.items()}
    settings["rank_pattern"] = {name: rank for name, (_, rank) in plain.items()}
    settings["alpha_pattern"] = {name: scale * rank for name, (scale, rank) in plain.items()}
    settings["use_rslora"] = False  # the scale is what it was in training, whatever the rank
    (folder / "adapter_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n"
    )


def _fitted(
    payload: Payload, fold: Mapping[str, Tensor]
) -> list[tuple[_Adapted, tuple[Tensor, ...]]]:
    """Each module of a fold with right (K, I) and left (O, K), or one matrix (O, I), checked."""
    known = {found.name: found for found in _adapted(payload.module)}
    fitted = []
    left_over = dict(fold)
    for name in sorted({_module(name) for name in fold}):
        if name not in known:
            raise LayoutError(
                f"Expected changes of weights that LoRA adapts at this site, got one of {name!r}; "
                "use the same payload.target-modules and versions of the packages."
            )
        found = known[name]
        if found.layer.use_dora.get(_ADAPTER):
            raise LayoutError(
                f"Expected plain LoRA under a change of {name!r}, got DoRA, which scales the "
                "frozen weight too; take 'use_dora' out of payload.options."
            )
        endings = (FOLD,) if name + FOLD in fold else (FOLD_A, FOLD_B)
        factors = tuple(left_over.pop(name + end) for end in endings if name + end in left_over)
        _check_shapes(found, factors, len(endings))
        fitted.append((found, factors))
    if left_over:
        raise LayoutError(f"Expected factors or a matrix for a module, got {min(left_over)!r} too.")
    return fitted


def _check_shapes(found: _Adapted, factors: tuple[Tensor, ...], count: int) -> None:
    outputs, inputs = found.b.shape[0], found.a.shape[1]
    columns = factors[0].shape[0] if len(factors) == 2 else outputs
    wanted = [(columns, inputs), (outputs, columns)][: len(factors)]
    got = [tuple(factor.shape) for factor in factors]
    if len(factors) != count or got != wanted or any(f.dtype != torch.float32 for f in factors):
        raise LayoutError(
            f"Expected a change of {found.name!r}, which has {inputs} inputs and {outputs} "
            f"outputs, as float32 factors (K, {inputs}) and ({outputs}, K) or one matrix, got "
            f"{got} in {[str(factor.dtype) for factor in factors]}."
        )


def _module(name: str) -> str:
    for ending in (FOLD_A, FOLD_B, FOLD):
        if name.endswith(ending):
            return name.removesuffix(ending)
    raise LayoutError(f"Expected factors of a change of frozen weights, got {name!r}.")


def _adapted(module: Any) -> list[_Adapted]:
    """Linear and embedding layers of a model that carry LoRA factors."""
    found = []
    for name, layer in module.named_modules():
        linear = getattr(layer, "lora_A", {})
        lookup = getattr(layer, "lora_embedding_A", {})
        if _ADAPTER in lookup:
            a, b = lookup[_ADAPTER], layer.lora_embedding_B[_ADAPTER]
        elif _ADAPTER in linear:
            a, b = linear[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        else:
            continue
        if a.dim() == 2:
            scale = float(layer.scaling[_ADAPTER])
            found.append(_Adapted(name, layer, a, b, scale, _ADAPTER in lookup))
    return found


def _on(found: _Adapted, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(factor.to(found.a.device) for factor in factors)


def _apart(product: Tensor) -> tuple[Tensor, Tensor]:
    """A (K, I) and B (O, K) of a product (O, I) in float64, without components that are zero."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    kept = max(int((s > s[0] * 1e-12).sum()), 1)
    root = s[:kept].sqrt()
    return (root[:, None] * vh[:kept]).float(), (u[:, :kept] * root).float()
