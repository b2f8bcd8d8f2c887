"""Typed, frozen configuration sections, and the errors a person reads when one is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot run: says what was expected, what came and what to do."""


class Section(BaseModel):
    """Base of every configuration section: frozen, strictly typed, keys in kebab case."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        protected_namespaces=(),
    )


def unknown(what: str, name: str, choices: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not among `choices`, with the nearest one suggested."""
    listed = sorted(choices)
    near = difflib.get_close_matches(name, listed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"Unknown {what} {name!r}.{hint} Choices: {', '.join(listed)}.")
