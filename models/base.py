"""The base model: found by name, checked, hashed, and read once per process."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models import embedded
from models.config import ModelConfig
from models.paths import located
from models.section import ConfigError

# Everything in a model folder that decides what the model computes or how text becomes tokens.
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model")
_DECISIVE = ("config.json", "*.safetensors", *_TOKENIZER)

# How a name starts that can only be a path, and so means nothing on another machine.
PATHLIKE = (".", "/", "~", "$")


@dataclass(frozen=True)
class Base:
    """A loaded base model with its tokenizer, its folder and newly initialised modules."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    from_scratch: bool
    fresh_modules: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Content digest of the folder; reads it whole, so only who compares it asks for it."""
        return digest_of(self.folder, weights=not self.from_scratch)


@dataclass
class BaseCache:
    """Keeps the last loaded base model of a process; `reads` counts loads from disk."""

    reads: int = 0
    _entry: tuple[str, Base] | None = field(default=None, repr=False)

    def get(self, key: str, read: Callable[[], Base]) -> Base:
        """Return the base model of `key`, reading it only when another one was kept."""
        if self._entry is None or self._entry[0] != key:
            self._entry = None  # free the old weights before the new ones are read
            self._entry = (key, read())
            self.reads += 1
        return self._entry[1]


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make torch's own draws within the block depend on `seed` alone, and on nothing outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def quiet() -> None:
    """Keep transformers' progress bars and remarks on new heads out of the logs."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # PEFT calls a method that transformers has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def find_folder(name: str, *, tokenizer: bool = True) -> Path:
    """Folder in hub format behind `name`; raises ConfigError when there is none.

    With a `tokenizer` it must hold one.
    """
    if name == "embedded":
        return embedded.ensure()
    folder = located(name)
    if not folder.exists() and not name.startswith(PATHLIKE):
        folder = _from_hub(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"Expected a model folder with a config.json, got {str(folder)!r}; save the model "
            "there with save_pretrained, or name a hub id."
        )
    if tokenizer and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise ConfigError(
            f"Expected a tokenizer in the model folder {str(folder)!r}, got none; save it there "
            "with tokenizer.save_pretrained."
        )
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.h5", "*.msgpack"]))
    except Exception as error:
        raise ConfigError(
            f"Expected 'embedded', a folder or a reachable hub id, got {name!r} "
            f"({type(error).__name__}: {error}); check the spelling, or download the model first."
        ) from error


def digest_of(folder: Path, *, weights: bool = True) -> str:
    """SHA-256 over the decisive files of a model folder; without weights when they are drawn."""
    drawn = () if weights else (".safetensors",)
    return _digest_of([path for path in _matching(folder, _DECISIVE) if path.suffix not in drawn])


def digest_of_tokenizer(folder: Path) -> str:
    """SHA-256 over the files of a folder that decide how text becomes tokens; empty for none."""
    files = _matching(folder, _TOKENIZER)
    return _digest_of(files) if files else ""


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _digest_of(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}:{content};".encode())
    return total.hexdigest()


def load(config: ModelConfig, *, path: str = "", num_labels: int = 0, seed: int = 0) -> Base:
    """Read the base model and tokenizer that `config` names, or those in `path`, onto the device.

    Raises ConfigError when the folder is not a model, is damaged, has no safetensors weights, or
    asks for a quantisation that this machine cannot do. Weights that the folder lacks are drawn
    from `seed`.
    """
    folder = find_folder(path or config.name)
    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        with seeded(seed):
            model, fresh = _read(config, folder, tokenizer.pad_token_id, num_labels)
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # A damaged file makes the libraries raise whatever they meet.
        raise ConfigError(
            f"Expected a model and tokenizer that transformers can read in {str(folder)!r}, got "
            f"{type(error).__name__}: {error}; copy it again, or save it with save_pretrained."
        ) from error
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if config.quantization == "none":
        model = model.to(device())
    return Base(model, tokenizer, folder, config.from_scratch, fresh)


def _read(
    config: ModelConfig, folder: Path, pad_token_id: int | None, num_labels: int
) -> tuple[Any, tuple[str, ...]]:
    classes = config.task == "classification"
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if classes
        else transformers.AutoModelForCausalLM
    )
    settings: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    try:
        shape = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a model that transformers knows in {str(folder)!r}, got: {error}"
        ) from error
    if classes:
        shape.num_labels = num_labels
    if shape.get_text_config().pad_token_id is None:
        shape.get_text_config().pad_token_id = pad_token_id
    if config.from_scratch:
        return auto.from_config(shape, **settings), ()
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"Expected *.safetensors weights in {str(folder)!r}, got none; pickled weights are "
            "never loaded: convert them with save_pretrained(safe_serialization=True)."
        )
    if config.quantization != "none":
        settings |= _quantised(config.quantization)
    model, info = auto.from_pretrained(
        folder,
        config=shape,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # Refused below, with both shapes in the message.
        **settings,
    )
    for key, found, expected in info["mismatched_keys"]:
        raise ConfigError(
            f"Expected {key!r} of shape {tuple(expected)} in {str(folder)!r}, as its config.json "
            f"and the number of classes ask for, got {tuple(found)}; set model.num-labels to the "
            "classes of its head, or name a model without one."
        )
    if info["missing_keys"] and not classes:
        raise ConfigError(
            f"Expected the weights of a whole causal-lm in {str(folder)!r}, got none for "
            f"{min(info['missing_keys'])!r}; copy the folder again, or name a model with it."
        )
    return model, tuple(sorted({key.rpartition(".")[0] for key in info["missing_keys"]}))


def context(model: PreTrainedModel) -> int | None:
    """Most positions that a model can tell apart, None where it sets no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    learnt = [m for n, m in model.named_modules() if n.endswith("position_embeddings")]
    if limit and learnt and getattr(learnt[0], "padding_idx", None) is not None:
        limit -= learnt[0].padding_idx + 1  # RoBERTa's positions start after the padding's.
    return limit


def _quantised(quantization: str) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"Expected the bitsandbytes package with model.quantization={quantization!r}, got "
            "none; run ./scripts/setup quantization, or set it to 'none'."
        )
    return {
        "device_map": {"": device()},
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_8bit=quantization == "int8",
            load_in_4bit=quantization == "int4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    }
