"""The shape of the code: rooms import one way, modules stay small, forbidden things stay out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What each room may import of ours: a whole room, or modules of it.
ROOMS: dict[str, set[str]] = {
    "models": {"models"},
    "strategies": {
        "strategies", "models.layout", "models.section", "models.seeds", "models.wire",
    },
    "privacy": {"privacy", "models", "strategies"},
    "flower_app": {"flower_app", "models", "strategies", "privacy"},
}  # fmt: skip
# Third-party packages with a home: package -> where it may be imported.
HOMES: dict[str, tuple[str, ...]] = {
    "flwr": ("flower_app/", "strategies/flower.py", "strategies/messages.py"),
    "flwr_datasets": ("flower_app/data/",),
    "matplotlib": ("flower_app/report/",),
    "transformers": ("models/", "flower_app/generate.py", "flower_app/bench/"),
    "peft": ("models/", "flower_app/generate.py", "flower_app/bench/"),
    "opacus": ("privacy/",),
    "dp_accounting": ("privacy/",),
    "cryptography": ("privacy/",),
    "tenseal": ("privacy/",),
    "grpc": ("flower_app/split/stream.py",),
}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MODULES = sorted(
    path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")
)
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def imports(module: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported, wherever it stands; of `from a import b`, `a.b`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, allowed: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in allowed)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute or a name; empty for what is neither."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def globals_of_chance(module: ast.Module, *, allowed_in: str = "") -> list[str]:
    """Uses of global random state, but for those in the function `allowed_in`."""
    inside = {
        id(node)
        for function in ast.walk(module)
        if isinstance(function, ast.FunctionDef) and function.name == allowed_in
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(module):
        name = dotted(node)
        numpy = name.startswith(("np.random.", "numpy.random."))
        explicit = name.endswith((".default_rng", ".Generator", ".SeedSequence", ".PCG64"))
        if numpy and not explicit:
            found.append(name)
        if name.startswith("random.") and name not in ("random.Random", "random.SystemRandom"):
            found.append(name)
        if id(node) not in inside and name in (
            "torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.set_rng_state",
            "torch.cuda.manual_seed", "torch.cuda.manual_seed_all",
        ):  # fmt: skip
            found.append(name)
    from_random = {"random.Random", "random.SystemRandom"}
    for name in imports(module):
        drawn = name.startswith(("random.", "numpy.random."))
        if drawn and name not in from_random | {
            "numpy.random.default_rng",
            "numpy.random.Generator",
        }:
            found.append(name)
    return found


def pickling(module: ast.Module) -> list[str]:
    """Imports of picklers, and calls that may load or write a pickle."""
    found = [name for name in imports(module) if name.split(".")[0] in PICKLERS]
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            allow = {k.arg: k.value for k in node.keywords}.get("allow_pickle")
            may = allow is not None and not (isinstance(allow, ast.Constant) and not allow.value)
            if called in ("torch.save", "torch.load") or may:
                found.append(called)
    return found


def undocumented(module: ast.Module) -> list[str]:
    """Public classes, functions and methods without a docstring; the module itself is one."""
    missing = [] if ast.get_docstring(module) or not module.body else ["<module>"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if node.name.startswith("_"):
                continue
            overload = any(dotted(d).endswith("overload") for d in node.decorator_list)
            if not ast.get_docstring(node) and not overload:
                missing.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(module.body, "")
    return missing


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 40
    assert {name.split("/")[0] for name in MODULES} == set(ROOMS)


def test_rooms_import_one_way() -> None:
    wrong = []
    for name in MODULES:
        room = name.split("/", maxsplit=1)[0]
        for imported in imports(tree(name)):
            foreign = within(imported, set(ROOMS)) and not within(imported, ROOMS[room])
            if foreign or within(imported, {"tests", "scripts"}):
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_third_parties_stay_in_their_rooms() -> None:
    wrong = [
        f"{name} imports {package}"
        for name in MODULES
        for package in {imported.split(".")[0] for imported in imports(tree(name))}
        if package in HOMES and not name.startswith(HOMES[package])
    ]
    assert not wrong


def test_no_module_is_long() -> None:
    lines = {n: (ROOT / n).read_text(encoding="utf-8").count("\n") for n in MODULES + TESTS}
    assert not {name: count for name, count in lines.items() if count > 400}


def test_nothing_is_pickled() -> None:
    wrong = [f"{name}: {what}" for name in MODULES for what in pickling(tree(name))]
    assert not wrong


def test_chance_is_never_global() -> None:
    wrong = [
        f"{name}: {what}"
        for name in MODULES
        for what in globals_of_chance(
            tree(name), allowed_in="seeded" if name == "models/base.py" else ""
        )
    ]
    assert not wrong


def test_everything_public_is_documented() -> None:
    wrong = [f"{name}: {what}" for name in MODULES for what in undocumented(tree(name))]
    assert not wrong


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ("import random\nrandom.seed(1)", True),
        ("import random\nx = random.random()", True),
        ("from random import shuffle", True),
        ("import random\nx = random.Random(1).random()", False),
        ("import numpy as np\nnp.random.seed(0)", True),
        ("import numpy as np\nnp.random.default_rng(0).normal()", False),
        ("from numpy.random import rand", True),
        ("import torch\ntorch.manual_seed(0)", True),
        ("import torch\ntorch.Generator().manual_seed(0)", False),
        ("import torch\ndef seeded():\n    torch.manual_seed(0)", False),
        ("import torch\ndef other():\n    torch.manual_seed(0)", True),
    ],
)
def test_global_chance_is_recognised(code: str, caught: bool) -> None:
    assert bool(globals_of_chance(ast.parse(code), allowed_in="seeded")) == caught


def test_the_other_checks_can_fail() -> None:
    assert undocumented(ast.parse("class A:\n    def b(self): ...\n    def _c(self): ...")) == [
        "<module>", "A", "A.b",
    ]  # fmt: skip
    for code in (
        "import dill",
        "from pickle import loads",
        "torch.load(f)",
        "g(allow_pickle=True)",
    ):
        assert pickling(ast.parse(code))
    assert not pickling(ast.parse("import json\nnp.load(f, allow_pickle=False)"))
    names = set(
        imports(ast.parse("def f():\n    from models.base import load\n    import flwr.app"))
    )
    assert names == {"models.base.load", "flwr.app"}
    assert not within("models.base.load", ROOMS["strategies"])
    assert within("models.layout.Layout", ROOMS["strategies"])
    assert not within("models.layouts", ROOMS["strategies"])


def test_scripts_are_thin() -> None:
    for path in (ROOT / "scripts").iterdir():
        if path.is_file():
            assert path.read_text(encoding="utf-8").count("\n") <= 60, path.name
