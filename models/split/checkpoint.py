"""The tensors of a model folder, each read when it is asked for and not before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.section import ConfigError
from models.split.adapter import before_adapting, digest_of_tensors
from models.split.cut import Part


class Checkpoint:
    """The tensors of a folder by the whole model's names, each read when it is asked for."""

    def __init__(self, files: Mapping[str, Any], model: Any, dtype: torch.dtype | None) -> None:
        self._files = files
        self._prefix = f"{model.base_model_prefix}."
        self._tied: Mapping[str, str] = model.all_tied_weights_keys
        self._dtype = dtype
        self._filled: dict[str, nn.Parameter] = {}

    def key(self, name: str) -> str | None:
        """What the folder calls a tensor, None where it lacks it; tied ones are one tensor."""
        name = before_adapting(name)
        name = self._tied.get(name, name)
        # Checkpoints of a bare backbone, as of sentence encoders, leave its prefix out.
        for known in (name, name.removeprefix(self._prefix)):
            if known in self._files:
                return known
        return None

    def read(self, key: str) -> Tensor:
        """A tensor as the folder has it."""
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

    def fill(self, part: Part, name: str) -> bool:
        """Put a parameter of a part into its place; whether the folder has it."""
        key = self.key(part.name_in_whole(name))
        if key is None:
            return False
        where, _, last = name.rpartition(".")
        owner = part.get_submodule(where)
        if key not in self._filled:
            self._filled[key] = nn.Parameter(self.read(key).to(self._dtype))
        found = self._filled[key]
        expected = getattr(owner, last)
        if self._filled[key].shape != expected.shape:
            raise ConfigError(
                f"Expected {key!r} of shape {tuple(expected.shape)}, as config.json says, got "
                f"{tuple(self._filled[key].shape)}; copy the folder again, or set model.num-labels "
                "to the classes of its head."
            )
        if ".modules_to_save." in name:  # a copy, which is trained beside the original
            found = nn.Parameter(found.detach().to(expected.dtype, copy=True))
        setattr(owner, last, found)
        return True

    def tensors_of(self, part: Part) -> dict[str, Tensor]:
        """All tensors of a part that the folder has, under the folder's names."""
        return {key: self.read(key) for key in self.keys_of(part)}

    def keys_of(self, part: Part) -> list[str]:
        """What the folder calls all tensors of a part that it has, sorted."""
        keys = {self.key(part.name_in_whole(name)) for name, _ in part.named_parameters()}
        return sorted(filter(None, keys))

    def digest(self, part: Part) -> str | None:
        """SHA-256 of a part's names, types, shapes and values; None where the folder has none."""
        keys = self.keys_of(part)
        return digest_of_tensors((key, self.read(key)) for key in keys) if keys else None


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> the open file that holds it."""
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"Expected safetensors in {str(path)!r}, but: {error}; copy it again."
                ) from error
            found |= dict.fromkeys(file.keys(), file)
        if not found:
            raise ConfigError(
                f"Expected *.safetensors weights in {str(folder)!r}, got none; convert them with "
                "save_pretrained, or copy the folder again."
            )
        yield found
