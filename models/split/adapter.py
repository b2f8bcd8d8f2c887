"""LoRA across the cut: attached to the whole model before it is cut, joined to one adapter after.

The whole model is there without weights when it is cut, so that every part carries the layers
that PEFT would give the whole, under the same names, and starts them from the same values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.base import seeded
from models.config import PayloadConfig
from models.payload import keep_heads_precise, peft_config, plain, sort_lists
from models.section import ConfigError
from models.seeds import derive
from models.split.cut import Part

_WRAPPER = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
# A soft prompt, as the whole model under PEFT has it, and as PEFT's files have it.
_PROMPT, _SAVED_PROMPT = "prompt_encoder.embedding.weight", "prompt_embeddings"
# What a file without the middle says of it, in its metadata.
_BESIDE = "middle"
# Keys of adapter_config.json that say where it came from, not what it computes.
_INDECISIVE = ("base_model_name_or_path", "revision", "peft_version", "inference_mode")


def adapt(model: Any, config: PayloadConfig | PeftConfig, task: str) -> PeftConfig:
    """Attach LoRA, or a soft prompt, to a whole model without weights; raises ConfigError.

    Of a prompt, nothing is left in the model: the head has it (`models.split.prompt`).
    """
    if isinstance(config, PeftConfig):
        return _attached(model, config)
    if config.kind not in ("lora", "soft-prompt"):
        raise ConfigError(
            f"Expected payload.kind='lora' in the parts of a split model, got {config.kind!r}; "
            "set it, or train the parts in full."
        )
    return _attached(model, peft_config(config, model, task, new_heads(task)))


def new_heads(task: str) -> tuple[str, ...]:
    """Modules that are trained and saved in full, since a folder may lack them."""
    return ("classifier",) if task == "classification" else ()


def _attached(model: Any, settings: PeftConfig) -> PeftConfig:
    what = "LoRA" if isinstance(settings, LoraConfig) else "a soft prompt"
    try:
        with seeded(0):
            peft.get_peft_model(model, settings)
        keep_heads_precise(model)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"Expected {what} to fit a {type(model).__name__}, but it does not ({error}); change "
            "payload.target-modules or payload.options."
        ) from error
    return settings


def start(part: Part, seed: int) -> None:
    """Draw the LoRA factors of a part, each from the seed and its module's name in the whole."""
    for name, layer in part.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for factor in _factors(layer):
            if factor.weight.is_meta:
                factor.to_empty(device="cpu")
        with seeded(derive(seed, "lora", part.name_in_whole(name))):
            layer.reset_lora_parameters("default", init_lora_weights=True)


def _factors(layer: LoraLayer) -> list[Any]:
    return [layer.lora_A["default"], layer.lora_B["default"]]


def before_adapting(name: str) -> str:
    """What the bare model calls a tensor that PEFT wrapped."""
    for wrapper in (".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(f"{wrapper}.", ".")
    return name


def train_only(part: Part, what: str) -> None:
    """Let gradients flow to a part's LoRA factors and new head (`lora`), to all of it but those
    factors (`full`), to the soft prompt alone (`soft-prompt`), or to nothing (`none`).
    """
    for name, parameter in part.named_parameters():
        factor = ".lora_" in name
        head = ".modules_to_save." in name
        replaced = ".original_module." in name  # by a new head
        chosen = {
            "none": False,
            "lora": factor or head,
            "full": not factor and not replaced,
            "soft-prompt": name.startswith("prompt_encoder."),
        }
        parameter.requires_grad_(chosen[what])


def factors(part: Part) -> dict[str, Tensor]:
    """Copies of what a part trains, by the names that the whole model's adapter has for it."""
    return {name: p.detach().cpu().clone() for name, p in _trained(part).items()}


def added(part: Part) -> dict[str, Tensor]:
    """Copies of all that LoRA adds to a part, a new class head too, be it trained or not.

    Of a part trained in full, its weights.
    """
    found = _added(part) | _trained(part)
    return {name: parameter.detach().cpu().clone() for name, parameter in found.items()}


@torch.no_grad()
def load_factors(part: Part, tensors: Mapping[str, Tensor]) -> None:
    """Write what `factors` gave into a part; raises KeyError for a name that is missing."""
    for name, parameter in _trained(part).items():
        parameter.copy_(tensors[name])


def _trained(part: Part) -> dict[str, nn.Parameter]:
    return {
        plain(part.name_in_whole(name)): parameter
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }


def _added(part: Part) -> dict[str, nn.Parameter]:
    return {
        plain(part.name_in_whole(name)): parameter
        for name, parameter in part.named_parameters()
        if ".lora_" in name or ".modules_to_save." in name
    }


def _plain(part: Part) -> dict[str, nn.Parameter]:
    """A part's parameters by the bare model's names."""
    return {before_adapting(part.name_in_whole(n)): p for n, p in part.named_parameters()}


def join(
    tensors: Mapping[str, Tensor], settings: PeftConfig, folder: Path, beside: str = ""
) -> None:
    """Write the factors of all parts as one PEFT adapter for the whole model.

    Of a site's own, which has no middle, `beside` is the digest of the one that it goes with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(folder))
    sort_lists(folder / "adapter_config.json")
    named = {
        _SAVED_PROMPT if name == _PROMPT else _WRAPPER + name: tensors[name].contiguous()
        for name in sorted(tensors)
    }
    save_file(named, folder / _WEIGHTS, {"format": "pt"} | ({_BESIDE: beside} if beside else {}))


def read_settings(folder: Path) -> PeftConfig:
    """Configuration of a LoRA adapter in PEFT's format; raises ConfigError for any other folder.

    Modules that it holds in full, but for new heads, are left out of it: `load_adapter` reads them.
    """
    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"Expected an adapter in PEFT's format in {str(folder)!r}, got: {error}; name the "
            "folder `adapter` of a run."
        ) from None
    if not isinstance(settings, LoraConfig) or settings.use_dora:
        raise ConfigError(
            f"Expected an adapter of plain LoRA in {str(folder)!r}, got {settings.peft_type}; "
            "parts of a model take no other."
        )
    settings.base_model_name_or_path = None  # the folder of whoever trained it
    if any("." in name for name in settings.modules_to_save or ()):  # a new head is no path
        settings.modules_to_save = None
    return settings


def digest_of_adapter(folder: Path, middle: Part) -> str:
    """SHA-256 of what an adapter holds for the middle, and of what decides how it is used.

    The ends may differ from site to site; a file without the middle names the one that it goes with
    (`middle_beside`). Raises ConfigError for a file that cannot be read.
    """
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    decisive = {key: value for key, value in settings.items() if key not in _INDECISIVE}
    total = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    with _opened(folder / _WEIGHTS) as file:
        there = {_WRAPPER + name for name in _plain(middle) | _added(middle)} & set(file.keys())
        held = ((key.removeprefix(_WRAPPER), file.get_tensor(key)) for key in sorted(there))
        total.update((middle_beside(folder) or digest_of_tensors(held)).encode())
    return total.hexdigest()


def middle_beside(folder: Path) -> str:
    """Digest of the middle that a site's own adapter goes with; empty for a joined one."""
    with _opened(folder / _WEIGHTS) as file:
        return str((file.metadata() or {}).get(_BESIDE, ""))


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and values, in the order given."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        octets = tensor.cpu().contiguous().flatten().view(torch.uint8)
        total.update(octets.numpy().data)
    return total.hexdigest()


@torch.no_grad()
def load_adapter(part: Part, folder: Path) -> None:
    """Read what an adapter for the whole model adds to a part, or holds of it, and nothing else.

    Raises ConfigError for a file without it, or with tensors of another shape.
    """
    path = folder / _WEIGHTS
    with _opened(path) as file:
        there = set(file.keys())
        kept = {n: p for n, p in _plain(part).items() if _WRAPPER + n in there}
        for name, parameter in (kept | _added(part)).items():
            key = _WRAPPER + name
            found = file.get_tensor(key) if key in there else torch.empty(0)
            if found.shape != parameter.shape:
                raise ConfigError(
                    f"Expected {key!r} of shape {tuple(parameter.shape)} in {str(path)!r}, got "
                    f"{tuple(found.shape) if key in there else 'none'}; name the adapter of "
                    "this model."
                )
            parameter.copy_(found)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"Expected safetensors in {str(path)!r}, but: {error}; copy it again."
        ) from error
