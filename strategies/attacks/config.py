"""`attack.*`: the attack that a simulation is put under."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.section import Section


class AttackConfig(Section):
    """`attack.*`: which sites are dishonest, and what they do; in simulation only."""

    name: str = Field("none", min_length=1, description="Attack to simulate.")
    fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of the sites that are malicious, drawn by name."
    )
    scale: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Strength of an attack that has one; 0 takes the attack's own.",
    )
    direction: Literal["std", "unit", "sign"] = Field(
        "std",
        description="Where `min-max` and `min-sum` push: against the honest updates' standard "
        "deviation, mean, or sign of the mean.",
    )
    trigger: str = Field(
        "cf mn tq", min_length=1, description="Words that a backdoor puts before a text."
    )
    target: int = Field(0, ge=0, description="Class that a backdoor leads to.")
    poison_fraction: float = Field(
        0.5, gt=0, le=1, description="Share of a malicious site's rows that a backdoor changes."
    )
    clean_label: bool = Field(
        False, description="A backdoor keeps labels and marks rows of the target class only."
    )
    answer: str = Field(
        "",
        description="Answer of every row with `poisoned-instructions`; empty: that of another row.",
    )
