"""Reading one part of a model from its folder, and handing out a folder in parts.

A part is read tensor by tensor: what belongs to the others is never in memory. The parts' own
folders hold the same tensors under the same names, so that they are read the same way.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from peft import PeftConfig
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from transformers import AutoConfig

from models.base import digest_of_tokenizer, seeded
from models.config import PayloadConfig
from models.section import ConfigError, Section
from models.split.adapter import adapt, before_adapting, new_heads, start
from models.split.checkpoint import Checkpoint, opened
from models.split.cut import Part, Parts, cut

PartName = Literal["head", "middle", "tail"]
Task = Literal["causal-lm", "classification"]
SITE: tuple[PartName, ...] = ("head", "tail")
SERVER: tuple[PartName, ...] = ("middle",)
RECORD = "parts.json"
# Files that would hand a side the whole model.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
# Keys of config.json that say where a model came from, not what it computes.
_INDECISIVE = ("_name_or_path", "_commit_hash", "transformers_version")


@dataclass(frozen=True)
class Cuts:
    """Where a model is cut, what it is for, and its classes (0: as its config.json says)."""

    head_blocks: int = 1
    tail_blocks: int = 1
    task: Task = "causal-lm"
    num_labels: int = 0


class Record(Section):
    """What `parts.json` says of a folder of parts: the cut, and the SHA-256 of every part.

    That of the tokenizer's files too, which are at the site alone.
    """

    head_blocks: int = Field(ge=1)
    tail_blocks: int = Field(ge=1)
    task: Task
    sha256: dict[PartName, str]
    tokenizer: str

    @property
    def cuts(self) -> Cuts:
        """The cut."""
        return Cuts(self.head_blocks, self.tail_blocks, self.task)


def load_parts(
    folder: Path,
    wanted: Collection[PartName],
    cuts: Cuts,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    payload: PayloadConfig | PeftConfig | None = None,
) -> dict[PartName, Part]:
    """Read parts of the model in a folder, and nothing else, onto the CPU.

    With a `payload`, LoRA is attached as to the whole. Its factors, and a class head that the
    folder lacks, are drawn from `seed`. Raises ConfigError for a model that cannot be cut, and for
    a folder without the tensors of these parts.
    """
    parts, _ = load_split(folder, wanted, cuts, dtype=dtype, seed=seed, payload=payload)
    return {name: getattr(parts, name) for name in wanted}


def load_split(
    folder: Path,
    wanted: Collection[PartName],
    cuts: Cuts,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    payload: PayloadConfig | PeftConfig | None = None,
) -> tuple[Parts, PeftConfig | None]:
    """All parts of the model in a folder, with the weights of those `wanted` alone.

    The others hold what LoRA adds, and a new class head. Raises as `load_parts`.
    """
    model, settings, parts = _empty(folder, cuts, dtype, payload)
    with opened(folder) as files:
        have = Checkpoint(files, model, dtype)
        for place, part in parts._asdict().items():
            start(part, seed)
            missing = [
                name
                for name, parameter in part.named_parameters()
                if parameter.is_meta
                and (place in wanted or ".modules_to_save." in name)
                and not have.fill(part, name)
            ]
            _draw(model, part, missing, folder, cuts, seed)
            part.eval()
    return parts, settings


def empty(
    folder: Path,
    cuts: Cuts,
    dtype: torch.dtype = torch.float32,
    payload: PayloadConfig | PeftConfig | None = None,
) -> tuple[Any, Parts]:
    """The whole model and its parts without any weights; raises ConfigError."""
    model, _, parts = _empty(folder, cuts, dtype, payload)
    return model, parts


def _empty(
    folder: Path, cuts: Cuts, dtype: torch.dtype, payload: PayloadConfig | PeftConfig | None
) -> tuple[Any, PeftConfig | None, Parts]:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a model that transformers knows in {str(folder)!r}, got: {error}"
        ) from error
    classes = cuts.task == "classification"
    if classes and cuts.num_labels:
        config.num_labels = cuts.num_labels
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if classes
        else transformers.AutoModelForCausalLM
    )
    with init_empty_weights(include_buffers=False):  # buffers are computed, not read
        model = auto.from_config(config, dtype=dtype)
    settings = adapt(model, payload, cuts.task) if payload else None
    return model, settings, cut(model, cuts.head_blocks, cuts.tail_blocks)


def write_parts(folder: Path, out: Path, cuts: Cuts) -> dict[str, Path]:
    """Write what a site and what the server needs to `out/site` and `out/server`.

    Tokenizer and other small files go to the site, `parts.json` to both. Raises ConfigError for a
    model that cannot be cut, and for folders that exist already.
    """
    model, parts = empty(folder, cuts)
    places = {"site": SITE, "server": SERVER}
    for place in places:
        if (out / place).exists():
            raise ConfigError(
                f"Expected no folder {str(out / place)!r} yet, got one; remove it, or name another."
            )
    with opened(folder) as files:
        have = Checkpoint(files, model, None)
        record = _record(have, parts, folder, cuts)
        for place, names in places.items():
            (out / place).mkdir(parents=True)
            shutil.copyfile(folder / "config.json", out / place / "config.json")
            (out / place / RECORD).write_text(record.model_dump_json(by_alias=True, indent=1))
            for name in names:
                tensors = have.tensors_of(getattr(parts, name))
                save_file(tensors, out / place / f"{name}.safetensors", {"format": "pt"})
    for path in folder.iterdir():
        weights = path.suffix in _WEIGHTS or "index" in path.name
        if path.is_file() and not weights and path.name != RECORD:
            shutil.copyfile(path, out / "site" / path.name)
    return {place: out / place for place in places}


def digest_of_parts(folder: Path, cuts: Cuts) -> str:
    """SHA-256 of a model, tokenizer and cut: one for the whole folder, the site's, the server's.

    What the folder holds is read, parts tensor by tensor; what it lacks is taken from its
    `parts.json`. Raises ConfigError for a folder that was cut elsewhere, that lacks a part and
    `parts.json`, and whose tensors are not those that were cut.
    """
    model, parts = empty(folder, cuts)
    known = read_record(folder)
    if known is not None and known.cuts != Cuts(cuts.head_blocks, cuts.tail_blocks, cuts.task):
        raise ConfigError(
            f"Expected parts cut as {_words(cuts)} in {str(folder)!r}, got {_words(known.cuts)}; "
            "cut the model again, or set split.head-blocks and split.tail-blocks to these."
        )
    with opened(folder) as files:
        found = _record(Checkpoint(files, model, None), parts, folder, cuts, known)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    decisive = {key: value for key, value in config.items() if key not in _INDECISIVE}
    text = json.dumps([decisive, found.model_dump()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(folder: Path) -> Record | None:
    """What `parts.json` says, None for a folder without; raises ConfigError for a damaged one."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"Expected {RECORD} as ./scripts/split cut writes it in {str(folder)!r}, got: "
            f"{error.errors()[0]['msg']}; copy the folder again, or cut the model again."
        ) from None


def _record(
    have: Checkpoint, parts: Parts, folder: Path, cuts: Cuts, known: Record | None = None
) -> Record:
    """Digests of all parts: of those that are here as they are, of the others as `known` says."""
    sums: dict[PartName, str] = {}
    for name in (*SITE, *SERVER):
        told = known.sha256.get(name) if known else None
        found = have.digest(getattr(parts, name)) or told
        if found is None:
            raise ConfigError(
                f"Expected the {name} of the model in {str(folder)!r}, got none of its tensors; "
                "give the folder of the whole model, or one that ./scripts/split cut wrote."
            )
        if told not in (None, found):
            raise ConfigError(
                f"Expected the {name} in {str(folder)!r} as it was cut, got other tensors than "
                f"{RECORD} says; copy the folder again."
            )
        sums[name] = found
    # Rows of ids that mean other words elsewhere would train without an error.
    tokenizer = digest_of_tokenizer(folder)
    if known and tokenizer not in ("", known.tokenizer):
        raise ConfigError(
            f"Expected the tokenizer in {str(folder)!r} as the model was cut with, got other files "
            f"than {RECORD} says; copy the folder again, or cut the model again with this one."
        )
    return Record(
        head_blocks=cuts.head_blocks,
        tail_blocks=cuts.tail_blocks,
        task=cuts.task,
        sha256=sums,
        tokenizer=tokenizer or (known.tokenizer if known else ""),
    )


def _words(cuts: Cuts) -> str:
    return f"{cuts.head_blocks}/{cuts.tail_blocks} for {cuts.task}"


def _draw(
    model: Any, part: Part, missing: Collection[str], folder: Path, cuts: Cuts, seed: int
) -> None:
    """Draw a new class head, which is trained and saved; refuse a folder that lacks others."""
    heads = tuple(f"{name}." for name in new_heads(cuts.task))
    names = (before_adapting(part.name_in_whole(name)) for name in missing)
    if others := [name for name in names if not name.startswith(heads)]:
        whole = (
            f"a whole model that lacks its {cuts.task} head alone" if heads else "the whole model"
        )
        raise ConfigError(
            f"Expected {others[0]!r} in {str(folder)!r}, got no such tensor; give this side the "
            f"folder of its own part, or {whole}."
        )
    owners = {name.rpartition(".")[0] for name in missing}
    with seeded(seed):
        for name in sorted(owners):
            owner = part.get_submodule(name)
            owner.to_empty(device="cpu", recurse=False)
            model._init_weights(owner)
