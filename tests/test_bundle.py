"""The Flower app bundle, as partners receive it: small, complete, and nothing but the app."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from flower_app.config import sections
from tests.test_architecture import imports

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("flower_app", "models", "privacy", "strategies")
# Made by Flower itself, or needed to read the bundle.
BESIDE = {"pyproject.toml", "LICENSE"}


@pytest.fixture(scope="module")
def bundle() -> bytes:
    return build_fab_from_disk(ROOT)


@pytest.fixture(scope="module")
def names(bundle: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        return [name for name in archive.namelist() if not name.startswith(".info/")]


def test_bundle_is_small(bundle: bytes) -> None:
    """Flower takes 10 MB; ours is code alone."""
    assert len(bundle) < 1_500_000
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        assert sum(info.file_size for info in archive.infolist()) < 1_500_000


def test_bundle_holds_the_app_and_nothing_else(names: list[str]) -> None:
    assert {"flower_app/server_app.py", "flower_app/client_app.py", "pyproject.toml"} <= set(names)
    for name in names:
        in_room = name.endswith(".py") and name.split("/")[0] in ROOMS
        assert in_room or name in BESIDE, name
        parts = set(name.removesuffix(".py").split("/"))
        assert not parts & {"tests", "scripts", "bench", "conftest", "docs", "runs", ".venv"}, name


def test_bundle_holds_the_modules_that_the_app_needs_and_no_others(names: list[str]) -> None:
    """Commands that people type stay out: partners receive what runs."""
    needed: set[str] = set()
    to_do = ["flower_app/server_app.py", "flower_app/client_app.py"]
    while to_do:
        name = to_do.pop()
        if name not in needed:
            needed.add(name)
            found = imports(ast.parse((ROOT / name).read_text(encoding="utf-8")))
            to_do += [file for module in found for file in files_of(module)]
    assert {name for name in names if name.endswith(".py")} == needed


def files_of(module: str) -> set[str]:
    """The files that an import of a dotted name, of a module or something in it, reads."""
    parts = module.split(".")
    stems = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    files = {f"{stem}{end}" for stem in stems for end in (".py", "/__init__.py")}
    return {file for file in files if file.split("/")[0] in ROOMS and (ROOT / file).is_file()}


def test_same_files_make_the_same_bundle(bundle: bytes) -> None:
    assert build_fab_from_disk(ROOT) == bundle


def test_bundle_declares_the_components(bundle: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        settings = tomllib.loads(archive.read("pyproject.toml").decode())
    app = settings["tool"]["flwr"]["app"]
    assert app["components"] == {
        "serverapp": "flower_app.server_app:app", "clientapp": "flower_app.client_app:app",
    }  # fmt: skip
    assert set(app["config"]) == set(sections())


_IMPORT = """
import importlib, pathlib, sys
here = pathlib.Path.cwd()
import flower_app.client_app, flower_app.server_app
assert not {"opacus", "dp_accounting", "scipy.stats"} & set(sys.modules), "slow to import"
files = [p for room in sys.argv[1:] for p in sorted((here / room).rglob("*.py"))]
for path in files:
    parts = path.relative_to(here).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(here), module.__file__
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flower_app.client_app import app as client
from flower_app.server_app import app as server
assert isinstance(client, ClientApp) and isinstance(server, ServerApp)
print(len(files), "modules")
"""


def test_an_unpacked_bundle_imports_alone(bundle: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        archive.extractall(tmp_path)
    # -c puts the working directory first on the path; nothing of the checkout is on it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, *ROOMS], cwd=tmp_path, env=environment, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 40
