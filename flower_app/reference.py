"""The references of configuration keys and of strategies, made from the code.

`python -m flower_app.reference` rewrites docs/configuration.md, docs/strategies.md and the tables
in pyproject.toml.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from flower_app.config import sections
from flower_app.node import NodeConfig
from models import payload
from models.section import Section
from privacy.policy import Policy
from strategies import registry, together
from strategies.attacks import registry as attacks

ROOT = Path(__file__).resolve().parent.parent
_BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "not empty"}


def markdown() -> str:
    """The reference as a Markdown page: a table per section."""
    parts = [_HEAD]
    for name, cls in sections().items():
        parts.append(f"## `{name}.*`\n\n{_table(cls, f'{name}.')}")
    parts.append(_NODE + _table(NodeConfig, ""))
    parts.append(_POLICY + _table(Policy, ""))
    return "\n".join(parts)


def toml() -> str:
    """The tables of pyproject.toml that declare every key with its default."""
    parts = []
    for name, cls in sections().items():
        lines = [f"[tool.flwr.app.config.{name}]"]
        lines += [f"{info.alias} = {json.dumps(info.default)}" for info in _fields(cls)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def with_toml(text: str) -> str:
    """`text` of a pyproject.toml with its run config tables replaced by the current ones."""
    tables = r"(^\[tool\.flwr\.app\.config\.\w+\]\n(?:(?!\[).*\n)*)+"
    return re.sub(tables, lambda _: toml() + "\n", text, count=1, flags=re.MULTILINE)


def _fields(cls: type[Section]) -> list[FieldInfo]:
    return list(cls.model_fields.values())


def _table(cls: type[Section], prefix: str) -> str:
    rows = ["| Key | Type | Default | Choices | Meaning |", "|---|---|---|---|---|"]
    for info in _fields(cls):
        key = f"{prefix}{info.alias}"
        cells = (
            f"`{key}`",
            _type(info),
            f"`{json.dumps(info.default)}`",
            _choices(key, info),
            info.description or "",
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(info: FieldInfo) -> str:
    annotation = _given(info)
    if typing.get_origin(annotation) is list:
        return "list of strings"
    options = typing.get_args(annotation)
    kind: Any = type(options[0]) if options else annotation
    return {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}[kind.__name__]


def _given(info: FieldInfo) -> Any:
    """The type of a value where there is one: without the None of a key that may be left out."""
    kinds = [kind for kind in typing.get_args(info.annotation) if kind is not type(None)]
    return kinds[0] if type(None) in typing.get_args(info.annotation) else info.annotation


def _choices(key: str, info: FieldInfo) -> str:
    named = {
        "payload.kind": payload.kinds(),
        "strategy.rule": sorted(registry.RULES),
        "strategy.pre": sorted(registry.PRE),
        "strategy.server-optimizer": sorted(registry.SERVER_OPTIMIZERS),
        "attack.name": list(attacks.ATTACKS),
    }.get(key)
    if not named and typing.get_origin(_given(info)) is typing.Literal:
        named = list(typing.get_args(_given(info)))
    if named:
        return ", ".join(f"`{name}`" for name in named)
    bounds = [
        text.format(getattr(rule, name))
        for rule in info.metadata
        for name, text in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join(bounds)


def strategies() -> str:
    """Every rule, stage before it and server optimiser, as its docstring says, with its options."""
    rules = _catalogue("Rules", "rule", registry.RULES)
    before = _catalogue("Before the rule", "pre", registry.PRE)
    optimizers = registry.SERVER_OPTIMIZERS
    after = _catalogue("Server optimisers", "server-optimizer", optimizers, "server-")
    return "\n".join([_STRATEGIES, rules, before, after])


def _catalogue(
    title: str, key: str, factories: Mapping[str, Callable[..., Any]], prefix: str = ""
) -> str:
    entries = [f"## {title}\n\nPicked with `strategy.{key}`.\n"]
    for name, factory in factories.items():
        if factories is registry.PRE and name in registry.RULES:
            said = _WEIGHS if name in together.WEIGHING else _CHOOSES
            entries.append(f"### {name}\n\nAs the rule of that name{said}\n")
            continue
        options = [
            f"`strategy.{prefix}{option.replace('_', '-')}`"
            for option in inspect.signature(factory).parameters
        ]
        listed = f"\n\nOptions: {', '.join(options)}." if options else ""
        entries.append(f"### {name}\n\n{inspect.getdoc(factory)}{listed}\n")
    return "\n".join(entries)


_CHOOSES = "; the updates that it chooses go on to the rule after it."
_WEIGHS = (
    ", whose weights go to the rule after it. That is one which minds them, such as\n`mean` or "
    "`lora-svd`; what counts rows alike is refused."
)

_STRATEGIES = """# Strategies

How the updates of the sites become the next model: stages before the rule in the order given, one
rule, one server optimiser. Every name works as a configuration key and in `strategies.aggregate`,
where an option `strategy.clip-norm` is the argument `clip_norm`. Defaults and ranges of the
options are in [configuration.md](configuration.md).

This page is made from the docstrings by `python -m flower_app.reference`; a test keeps it in step.
"""

_HEAD = """# Configuration

Every key of the run config. Defaults are declared in `pyproject.toml` under
`[tool.flwr.app.config]`; change them there, or for one run:

```bash
flwr run . --stream \\
  --run-config "strategy.server-optimizer='adam' strategy.server-learning-rate=0.01"
flwr run . --stream --run-config my-run.toml
```

Unknown, missing, mistyped and contradictory keys are refused before anything is loaded.
This page is made from the types by `python -m flower_app.reference`; a test keeps it in step.
"""

_NODE = """## Node config

What the operator of a site gives its SuperNode, as
`flower-supernode --node-config 'site="north" data-path="/data/notes.jsonl"'`. Nothing of it leaves
the site but the name and a rank below `payload.rank`.

"""


_POLICY = """## Policy of a site

A TOML file at the site, which its node config names as `policy-path`; [privacy.md](privacy.md) says
how it is applied. A key that is left out (`null`) forbids nothing.

"""


def main() -> None:
    """Rewrite the generated files."""
    (ROOT / "docs" / "configuration.md").write_text(markdown())
    (ROOT / "docs" / "strategies.md").write_text(strategies())
    project = ROOT / "pyproject.toml"
    project.write_text(with_toml(project.read_text()))


if __name__ == "__main__":
    main()
