"""The embedded rows: docstrings and source of standard-library packages, each package a site.

Every package has its own subject and manner, so the sites differ as real ones do. The files are
read, never imported.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from models.section import ConfigError

PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "email",
    "encodings",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "re",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zoneinfo",
)
"""Packages that no distributor of CPython 3.11 or later splits off, so that sites are the same."""

MIN_CHARS = 64
MAX_CHARS = 480

_Scope = ast.Module | ast.ClassDef | ast.If | ast.Try
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def rows(library: Path | None = None) -> list[dict[str, str]]:
    """Return rows with the columns `site` (package) and `text`, in an order that never changes.

    A text is a module's or class's docstring or the source of a function, without its indentation.
    Longer ones are cut at line ends into texts of at most MAX_CHARS characters (or of one line);
    those below MIN_CHARS and repetitions inside a package are left out. `library` is the folder of
    the standard library, by default this interpreter's. Raises ConfigError if a package is not
    there as source.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    return [
        {"site": package, "text": text}
        for package in PACKAGES
        for text in _package_texts(library / package)
    ]


def _package_texts(folder: Path) -> list[str]:
    files = sorted(
        path
        for path in folder.rglob("*.py")
        if not {"test", "tests"} & set(path.relative_to(folder).parts)
    )
    if not files:
        raise ConfigError(
            f"Expected the source of the standard library's package {folder.name!r} in {folder}, "
            "got no .py file; use a full CPython, or set data.source to data of your own."
        )
    texts = (text for path in files for text in _module_texts(path))
    return list(dict.fromkeys(texts))


def _module_texts(path: Path) -> Iterator[str]:
    source = path.read_bytes()
    tree = ast.parse(source)
    # The interpreter's own files are UTF-8; the parser above has checked that.
    lines = source.decode("utf-8").splitlines(keepends=True)
    for block in _blocks(tree, lines):
        for piece in _pieces(block):
            if len(piece) >= MIN_CHARS:
                yield piece


def _blocks(scope: _Scope, lines: list[str]) -> Iterator[str]:
    """Yield docstrings of the module and its classes, and functions and methods, in file order."""
    if isinstance(scope, (ast.Module, ast.ClassDef)) and (doc := ast.get_docstring(scope)):
        yield doc
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, _Function):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            yield textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))
        elif isinstance(node, (ast.ClassDef, ast.If, ast.Try)):
            yield from _blocks(node, lines)


def _pieces(block: str) -> Iterator[str]:
    """Cut a block at line ends into pieces of at most MAX_CHARS, or of one line."""
    piece = ""
    for line in block.splitlines(keepends=True):
        if piece and len(piece) + len(line) > MAX_CHARS:
            yield piece.strip("\n").rstrip()
            piece = ""
        piece += line
    yield piece.strip("\n").rstrip()
