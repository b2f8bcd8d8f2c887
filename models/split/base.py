"""A base model of which one side of the cut holds its own parts alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoTokenizer

from models.base import Base, device, find_folder, quiet
from models.config import ModelConfig, PayloadConfig
from models.section import ConfigError
from models.split.adapter import new_heads
from models.split.config import SplitConfig
from models.split.cut import Middle
from models.split.full import train
from models.split.load import (
    RECORD,
    SERVER,
    SITE,
    Cuts,
    PartName,
    digest_of_parts,
    load_split,
    read_record,
)
from models.split.parity import check_parity
from models.split.prompt import prompted
from models.split.site import SiteModel, SplitPayload

# Models without weights are made by a patch of torch.nn, and what is drawn comes from torch's own
# generator: both are the process's, so that its threads must load one after another.
_LOADING = Lock()


@dataclass(frozen=True)
class SplitBase(Base):
    """Head and tail as `model`, and the middle; what the other side holds has no weights here."""

    middle: Middle
    settings: PeftConfig
    cuts: Cuts

    @cached_property
    def digest(self) -> str:
        """One digest for the folders of both sides; reads what is here."""
        return digest_of_parts(self.folder, self.cuts)


def load(
    model: ModelConfig,
    payload: PayloadConfig,
    split: SplitConfig,
    wanted: Collection[PartName],
    *,
    path: str = "",
    num_labels: int = 0,
    seed: int = 0,
) -> SplitBase:
    """Read one side's parts of the base model, `load.SITE` or `load.SERVER`, onto the device.

    A server reads head and tail too where it hands out what is taken from them. Raises ConfigError
    for a model that cannot be cut, and for a folder without these parts.
    """
    with _LOADING:
        site = "head" in wanted
        folder = find_folder(path or model.name, tokenizer=False)
        if site or read_record(folder) is None:  # whose digest the sites' must equal
            find_folder(path or model.name)
        quiet()
        check_parity(folder, model.task)
        if not site and (why := _starts_from(split, payload)):
            _check_whole(folder, why)
            wanted = (*SITE, *SERVER)
        prompt = split.head == "soft-prompt"
        reads = site or (prompt and payload.init == "text")
        tokenizer: Any = _tokenizer(path or model.name) if reads else None
        cuts = Cuts(split.head_blocks, split.tail_blocks, model.task, num_labels)
        parts, settings = load_split(
            folder, wanted, cuts, dtype=getattr(torch, model.dtype), seed=seed,
            payload=payload.model_copy(update={"kind": "soft-prompt" if prompt else "lora"}),
        )  # fmt: skip
        assert settings is not None
        if prompt:
            parts = parts._replace(head=prompted(parts.head, payload, tokenizer, seed))
        settings = train(parts, settings, (split.head, split.middle, split.tail))
        ends: Any = SiteModel(parts.head, parts.tail)
        (ends if site else parts.middle).to(device())
        fresh = new_heads(model.task)
        return SplitBase(ends, tokenizer, folder, False, fresh, parts.middle, settings, cuts)


def _tokenizer(name: str) -> Any:
    found = AutoTokenizer.from_pretrained(find_folder(name))
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def _starts_from(split: SplitConfig, payload: PayloadConfig) -> str:
    """The settings whose start values are taken from head or tail; empty where none are."""
    if split.head == "soft-prompt" and payload.init != "random":
        return f"payload.init={payload.init!r}"
    ends = {"split.head": split.head, "split.tail": split.tail}
    return " and ".join(f"{key}='full'" for key, what in ends.items() if what == "full")


def _check_whole(folder: Path, why: str) -> None:
    """Refuse a server's own part, which lacks the weights that the sites are to start from."""
    if read_record(folder) is not None and not all(
        (folder / f"{name}.safetensors").is_file() for name in SITE
    ):
        raise ConfigError(
            f"Expected the whole model in {str(folder)!r} at the server with {why}, which it "
            f"starts from, got parts with {RECORD}; give the server the whole folder, or set "
            + ("payload.init='random'." if "payload.init" in why else "'lora' instead.")
        )


def attach(base: SplitBase, personal: str, frozen: str = "") -> SplitPayload:
    """What is trained at the sites, and travels but for its `personal` parts.

    Parameters with the part `frozen` in their name stay at their start. Raises ConfigError where
    nothing is trained there.
    """
    ends: Any = base.model
    for name, parameter in ends.named_parameters():
        if frozen and f".{frozen}." in name:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in ends.parameters()):
        raise ConfigError(
            "Expected something to train at the sites, got split.head='none' and "
            "split.tail='none'; set one of them to 'lora' or 'full'."
        )
    return SplitPayload(ends, base.settings, personal, base.fresh_modules)
