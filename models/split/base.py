"""A base model of which one side of the cut holds its own parts alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoTokenizer

from models.base import Base, device, find_folder, quiet
from models.config import ModelConfig, PayloadConfig
from models.section import ConfigError
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
from models.split.site import SiteModel, SplitPayload


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

    A server that hands out head or tail in full reads both too. Raises ConfigError for a model that
    cannot be cut, and for a folder without these parts.
    """
    site = "head" in wanted
    folder = find_folder(path or model.name, tokenizer=site)
    quiet()
    check_parity(folder, model.task)
    if not site and "full" in (split.head, split.tail):
        _check_whole(folder)
        wanted = (*SITE, *SERVER)
    cuts = Cuts(split.head_blocks, split.tail_blocks, model.task, num_labels)
    parts, settings = load_split(
        folder, wanted, cuts, dtype=getattr(torch, model.dtype), seed=seed,
        payload=payload.model_copy(update={"kind": "lora"}),
    )  # fmt: skip
    assert settings is not None
    settings = train(parts, settings, (split.head, split.middle, split.tail))
    ends: Any = SiteModel(parts.head, parts.tail)
    tokenizer: Any = None
    if site:
        ends.to(device())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    else:
        parts.middle.to(device())
    fresh = ("classifier",) if model.task == "classification" else ()
    return SplitBase(ends, tokenizer, folder, False, fresh, parts.middle, settings, cuts)


def _check_whole(folder: Path) -> None:
    """Refuse a server's own part, which lacks the weights that the sites are to start from."""
    if read_record(folder) is not None and not all(
        (folder / f"{name}.safetensors").is_file() for name in SITE
    ):
        raise ConfigError(
            f"Expected the whole model in {str(folder)!r} at the server, which hands out what "
            f"split.head='full' and split.tail='full' start from, got parts with {RECORD}; give "
            "the server the whole folder, or set both to 'lora'."
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
