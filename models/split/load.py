"""Reading one part of a model from its folder, and handing out a folder in parts.

A part is read tensor by tensor: what belongs to the others is never in memory. The parts' own
folders hold the same tensors under the same names, so that they are read the same way.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from models.base import seeded
from models.config import PayloadConfig
from models.section import ConfigError
from models.split.adapter import adapt, before_adapting, start
from models.split.cut import Part, Parts, cut

PartName = Literal["head", "middle", "tail"]
SITE: tuple[PartName, ...] = ("head", "tail")
SERVER: tuple[PartName, ...] = ("middle",)


@dataclass(frozen=True)
class Cuts:
    """Where a model is cut, and what it is for: `causal-lm` or `classification`."""

    head_blocks: int = 1
    tail_blocks: int = 1
    task: str = "causal-lm"
    num_labels: int = 0


def load_parts(
    folder: Path,
    wanted: Collection[PartName],
    cuts: Cuts,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    payload: PayloadConfig | None = None,
) -> dict[PartName, Part]:
    """Read parts of the model in a folder, and nothing else, onto the CPU.

    With a `payload`, LoRA is attached as to the whole. Its factors, and a class head that the
    folder lacks, are drawn from `seed`. Raises ConfigError for a model that cannot be cut, and for
    a folder without the tensors of these parts.
    """
    model, parts = empty(folder, cuts, dtype, payload)
    chosen: dict[PartName, Part] = {name: getattr(parts, name) for name in wanted}
    with _opened(folder) as files:
        have = _Checkpoint(files, model, dtype)
        for part in chosen.values():
            start(part, seed)
            missing = [
                name
                for name, parameter in part.named_parameters()
                if parameter.is_meta and not have.fill(part, name)
            ]
            _draw(model, part, missing, folder, cuts, seed)
    for part in chosen.values():
        part.eval()
    return chosen


def empty(
    folder: Path,
    cuts: Cuts,
    dtype: torch.dtype = torch.float32,
    payload: PayloadConfig | None = None,
) -> tuple[Any, Parts]:
    """The whole model and its parts without any weights; raises ConfigError."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a model that transformers knows in {str(folder)!r}, got: {error}"
        ) from error
    classes = cuts.task == "classification"
    if classes:
        config.num_labels = cuts.num_labels
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if classes
        else transformers.AutoModelForCausalLM
    )
    with init_empty_weights(include_buffers=False):  # buffers are computed, not read
        model = auto.from_config(config, dtype=dtype)
    if payload is not None:
        adapt(model, payload, cuts.task)
    return model, cut(model, cuts.head_blocks, cuts.tail_blocks)


def write_parts(folder: Path, out: Path, cuts: Cuts) -> dict[str, Path]:
    """Write what a site and what the server needs to `out/site` and `out/server`.

    Tokenizer and other small files go to the site. Raises ConfigError for a model that cannot be
    cut, and for folders that exist already.
    """
    model, parts = empty(folder, cuts)
    places = {"site": SITE, "server": SERVER}
    for place in places:
        if (out / place).exists():
            raise ConfigError(
                f"Expected no folder {str(out / place)!r} yet, got one; remove it, or name another."
            )
    with _opened(folder) as files:
        have = _Checkpoint(files, model, None)
        for place, names in places.items():
            (out / place).mkdir(parents=True)
            shutil.copy(folder / "config.json", out / place)
            for name in names:
                tensors = have.tensors_of(getattr(parts, name))
                save_file(tensors, out / place / f"{name}.safetensors", {"format": "pt"})
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and "index" not in path.name:
            shutil.copy(path, out / "site")
    return {place: out / place for place in places}


class _Checkpoint:
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
        expected = getattr(owner, last).shape
        if self._filled[key].shape != expected:
            raise ConfigError(
                f"Expected {key!r} of shape {tuple(expected)}, as config.json says, got "
                f"{tuple(self._filled[key].shape)}; copy the folder again, or set model.num-labels "
                "to the classes of its head."
            )
        if ".modules_to_save." in name:  # a copy, which is trained beside the original
            found = nn.Parameter(found.detach().clone())
        setattr(owner, last, found)
        return True

    def tensors_of(self, part: Part) -> dict[str, Tensor]:
        """All tensors of a part that the folder has, under the folder's names."""
        keys = {self.key(part.name_in_whole(name)) for name, _ in part.named_parameters()}
        return {key: self.read(key) for key in sorted(filter(None, keys))}


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Any]]:
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


def _draw(
    model: Any, part: Part, missing: Collection[str], folder: Path, cuts: Cuts, seed: int
) -> None:
    """Draw a new class head; refuse a folder that lacks anything else."""
    blocks = [name for name in missing if cuts.task != "classification" or ".layer" in name]
    if blocks:
        raise ConfigError(
            f"Expected {part.name_in_whole(blocks[0])!r} in {str(folder)!r}, got no such tensor; "
            "give this side the folder of its own part, or the whole model."
        )
    owners = {name.rpartition(".")[0] for name in missing}
    with seeded(seed):
        for name in sorted(owners):
            owner = part.get_submodule(name)
            owner.to_empty(device="cpu", recurse=False)
            model._init_weights(owner)
