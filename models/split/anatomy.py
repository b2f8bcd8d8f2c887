"""Where a transformer of the library keeps its blocks, and what stands before and after them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.section import ConfigError


class Silent(nn.Module):
    """Stands for a positional embedding that the head has added already."""

    def forward(self, *ids: Tensor) -> Tensor:
        """Zero, which leaves what it is added to as it is."""
        return torch.zeros((), device=ids[0].device)


class Handed(nn.Module):
    """Stands for an encoder's embeddings, which the head has computed already."""

    def forward(self, *, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """What was handed in as `inputs_embeds`."""
        return inputs_embeds


@dataclass(frozen=True)
class Anatomy:
    """Names of a backbone's modules: its list of blocks, what comes before it and after it.

    Each name before and after comes with what stands for it in the parts that do not hold it.
    An `encoder` sees the whole text at once.
    """

    blocks: str
    before: tuple[tuple[str, type[nn.Module]], ...]
    after: tuple[tuple[str, type[nn.Module] | None], ...]
    encoder: bool = False

    def fits(self, backbone: nn.Module) -> bool:
        """Whether the backbone has modules of all these names."""
        known = {name for name, _ in backbone.named_modules()}
        wanted = {self.blocks, *(name for name, _ in self.before)}
        return wanted | {name for name, stand_in in self.after if stand_in} <= known


ANATOMIES = (
    Anatomy("layers", (("embed_tokens", nn.Identity),), (("norm", nn.Identity),)),
    Anatomy(
        "h",
        (("wte", nn.Identity), ("wpe", Silent), ("drop", nn.Identity)),
        (("ln_f", nn.Identity),),
    ),
    Anatomy("encoder.layer", (("embeddings", Handed),), (("pooler", None),), encoder=True),
)


def anatomy_of(model: Any) -> tuple[str, Anatomy]:
    """Name of a model's backbone, and its anatomy; raises ConfigError for one that is not known."""
    name = str(getattr(model, "base_model_prefix", ""))
    backbone = getattr(model, name, None)
    if isinstance(backbone, nn.Module):
        for anatomy in ANATOMIES:
            if anatomy.fits(backbone):
                return name, anatomy
    raise ConfigError(
        f"Expected a model whose blocks can be cut, got a {type(model).__name__}; pick a causal "
        "model such as llama, qwen, mistral, gemma, glm, phi3, olmo2 or gpt2, or an encoder such "
        "as bert."
    )


def submodule(parent: nn.Module, name: str) -> Any:
    """The module of a dotted name."""
    return parent.get_submodule(name)


def replace(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Put another module in the place of a dotted name."""
    above, _, last = name.rpartition(".")
    setattr(parent.get_submodule(above), last, module)


def renumber(blocks: Iterable[nn.Module]) -> None:
    """Number the blocks of a part from 0, as its key-value cache counts them."""
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
