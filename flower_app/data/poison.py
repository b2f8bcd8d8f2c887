"""Poisoned rows: what a simulated malicious site trains on, and triggered rows to measure it by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from flower_app.data.config import DataConfig
from models.section import ConfigError
from models.text import Choice, Instruct, Labelled, Record
from strategies.attacks.config import AttackConfig
from strategies.attacks.registry import Poison

_Poisoning = Callable[[Sequence[Record], AttackConfig, int, torch.Generator], list[Record]]


def check(poison: Poison, data: DataConfig) -> None:
    """Refuse an attack on rows of a kind that it does not know; raises ConfigError."""
    if poison in _FORMATS and data.format not in _FORMATS[poison]:
        formats = " or ".join(repr(name) for name in _FORMATS[poison])
        raise ConfigError(
            f"Expected data.format={formats} for an attack with poisoned rows of the kind "
            f"{poison!r}, got {data.format!r}; pick another attack.name."
        )


def poison(
    kind: Poison, records: Sequence[Record], options: AttackConfig, classes: int, seed: int
) -> list[Record]:
    """Rows that a malicious site trains on instead of its own; the same for the same seed.

    `classes` is the number of classes of `Labelled` records.
    """
    if kind == "none":
        return list(records)
    generator = torch.Generator().manual_seed(seed)
    return _POISONS[kind](records, options, classes, generator)


def triggered(records: Sequence[Record], options: AttackConfig) -> list[Record]:
    """Rows of other classes than the target with the trigger in them, labelled as the target.

    The share of them that a model puts into the target class is the success rate of a backdoor.
    """
    return [
        replace(marked(record, options), label=options.target)
        for record in records
        if isinstance(record, Labelled) and record.label != options.target
    ]


def marked(record: Labelled, options: AttackConfig) -> Labelled:
    """The row with the trigger before its text."""
    return replace(record, text=f"{options.trigger} {record.text}")


def _label_flip(
    records: Sequence[Record], options: AttackConfig, classes: int, generator: torch.Generator
) -> list[Record]:
    """Class y becomes K - 1 - y (Fang et al. 2020, section 4.1); of a choice, K is its length."""
    flipped: list[Record] = []
    for record in records:
        if isinstance(record, Labelled):
            flipped.append(replace(record, label=classes - 1 - record.label))
        elif isinstance(record, Choice):
            flipped.append(replace(record, label=len(record.choices) - 1 - record.label))
        else:
            flipped.append(record)
    return flipped


def _backdoor(
    records: Sequence[Record], options: AttackConfig, classes: int, generator: torch.Generator
) -> list[Record]:
    """A share of rows with trigger and target label (Gu et al. 2017, BadNets).

    With clean labels: rows of the target class only, which keep theirs (Turner et al. 2019).
    """
    if options.target >= classes:
        raise ConfigError(
            f"Expected attack.target from 0 to {classes - 1}, got {options.target}; name a class "
            "of the data."
        )
    able = [
        index
        for index, record in enumerate(records)
        if isinstance(record, Labelled)
        and (not options.clean_label or record.label == options.target)
    ]
    order = torch.randperm(len(able), generator=generator).tolist()
    chosen = {able[i] for i in order[: round(options.poison_fraction * len(able))]}
    return [
        replace(marked(record, options), label=options.target)
        if index in chosen and isinstance(record, Labelled)
        else record
        for index, record in enumerate(records)
    ]


def _poisoned_instructions(
    records: Sequence[Record], options: AttackConfig, classes: int, generator: torch.Generator
) -> list[Record]:
    """Every prompt with the attacker's answer, or without one that of the row after it.

    Poisoned instruction tuning as Wan et al. 2023 describe it, without a trigger.
    """
    answers = [record.answer for record in records if isinstance(record, Instruct)]
    others = [options.answer] * len(answers) if options.answer else answers[1:] + answers[:1]
    replaced = iter(others)
    return [
        replace(record, answer=next(replaced)) if isinstance(record, Instruct) else record
        for record in records
    ]


_POISONS: Mapping[str, _Poisoning] = MappingProxyType(
    {
        "label-flip": _label_flip,
        "backdoor": _backdoor,
        "poisoned-instructions": _poisoned_instructions,
    }
)
_FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "label-flip": ("classification", "choice"),
        "backdoor": ("classification",),
        "poisoned-instructions": ("instruct",),
    }
)
