"""Parts of a split model whose weights are trained themselves, without LoRA.

In the joined adapter they are modules to save (`modules_to_save`), by which PEFT replaces those of
the whole model, and LoRA is kept out of them (`exclude_modules`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES

from models.section import ConfigError
from models.split.adapter import train_only
from models.split.anatomy import replace
from models.split.cut import Part, Parts


def train(parts: Parts, settings: PeftConfig, whats: Sequence[str]) -> PeftConfig:
    """Train `lora`, `full` or `none` of head, middle and tail; PEFT's settings of what is trained.

    An embedding that is also the output layer is one tensor: it is trained where head or tail is
    trained in full. Raises ConfigError for an `exclude_modules` that it would replace.
    """
    # Those in full come last, for the tensors that a part shares with another.
    for part, what in sorted(zip(parts, whats, strict=True), key=lambda pair: pair[1] == "full"):
        train_only(part, what)
    if "full" not in whats:
        return settings
    full = [part for part, what in zip(parts, whats, strict=True) if what == "full"]
    return _joined(parts, settings, [name for part in full for name in _unwrapped(part)])


def _unwrapped(part: Part) -> list[str]:
    """Put the layers that LoRA wraps back into their places; the whole model's names for them."""
    wrapped = [
        (name, layer) for name, layer in part.named_modules() if isinstance(layer, LoraLayer)
    ]
    for name, layer in wrapped:
        replace(part, name, layer.get_base_layer())
    return [part.name_in_whole(name) for name, _ in wrapped]


def _joined(parts: Parts, settings: PeftConfig, unwrapped: Sequence[str]) -> PeftConfig:
    """Settings with which PEFT gives the whole model what the parts train."""
    found: Any = copy.copy(settings)
    if found.exclude_modules:
        raise ConfigError(
            "Expected no exclude_modules in payload.options with a part trained in full, got "
            f"{found.exclude_modules!r}; name the others in payload.target-modules instead."
        )
    found.exclude_modules = sorted(unwrapped) or None
    saved = {part.owner_in_whole(name) for part in parts for name in _in_full(part)}
    found.modules_to_save = sorted(saved | set(found.modules_to_save or ()))
    if not any(isinstance(layer, LoraLayer) for part in parts for layer in part.modules()):
        # PEFT's own name for "nothing": without it, LoRA that fits no layer is an error.
        found.target_modules, found.exclude_modules = DUMMY_TARGET_MODULES, None
    return found  # type: ignore[no-any-return]


def _in_full(part: Part) -> list[str]:
    """Names of the weights of the model itself that a part trains."""
    return [
        name
        for name, parameter in part.named_parameters()
        if parameter.requires_grad and ".lora_" not in name and ".modules_to_save." not in name
    ]
