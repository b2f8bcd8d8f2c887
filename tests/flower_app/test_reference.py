"""The generated reference and the declared defaults are in step with the types."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from flower_app import reference
from flower_app.config import defaults, known_keys, sections
from flower_app.node import NodeConfig
from models.section import Section
from strategies import registry

PAGE = reference.ROOT / "docs" / "configuration.md"
PROJECT = reference.ROOT / "pyproject.toml"


def test_the_page_is_what_the_types_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.markdown(), (
        "run: python -m flower_app.reference"
    )


def test_the_page_of_strategies_is_what_the_code_says() -> None:
    page = reference.ROOT / "docs" / "strategies.md"
    assert page.read_text(encoding="utf-8") == reference.strategies(), (
        "run: python -m flower_app.reference"
    )


@pytest.mark.parametrize(
    "name", [*registry.RULES, *registry.PRE, *registry.SERVER_OPTIMIZERS], ids=str
)
def test_every_strategy_is_described_with_its_options(name: str) -> None:
    entry = reference.strategies().split(f"### {name}\n", 1)[1].split("\n##")[0].strip()
    assert len(entry) > 30 and entry.split("\n\nOptions")[0].endswith((".", ")"))
    for key in re.findall(r"`(strategy\.[\w-]+)`", entry.partition("\n\nOptions: ")[2]):
        assert key in known_keys(), key


def test_pyproject_is_what_the_types_say() -> None:
    text = PROJECT.read_text(encoding="utf-8")
    assert text == reference.with_toml(text), "run: python -m flower_app.reference"


def _declared() -> dict[str, Any]:
    nested = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    return {f"{s}.{key}": value for s, keys in nested.items() for key, value in keys.items()}


def test_pyproject_declares_every_default_with_its_type() -> None:
    declared = _declared()
    assert declared == defaults()
    assert {k: type(v) for k, v in declared.items()} == {k: type(v) for k, v in defaults().items()}


def test_a_changed_table_is_put_right_and_the_rest_kept() -> None:
    text = PROJECT.read_text(encoding="utf-8")
    changed = text.replace("\nrounds = 5\n", "\nrounds = 6\nruonds = 5\n")
    assert changed != text
    assert reference.with_toml(changed) == text


@pytest.mark.parametrize("key", known_keys())
def test_every_key_is_described_on_the_page_once(key: str) -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").split("\n") if f"| `{key}` |" in line]
    assert len(rows) == 1
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", rows[0])[1:-1]]
    assert len(cells) == 5
    _, type_, default, _, meaning = cells
    assert type_ and default
    assert len(meaning) >= 10 and meaning.endswith((".", "`"))


def test_every_field_has_a_description() -> None:
    classes: list[type[Section]] = [*sections().values(), NodeConfig]
    for cls in classes:
        for name, info in cls.model_fields.items():
            assert info.description, f"{cls.__name__}.{name}"
