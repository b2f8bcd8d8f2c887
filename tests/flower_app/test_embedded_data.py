"""The embedded rows: real source of the standard library, one package a site, nothing imported."""

from __future__ import annotations

import ast
import collections
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flower_app.data.embedded import MAX_CHARS, MIN_CHARS, PACKAGES, rows
from models.section import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found() -> list[dict[str, str]]:
    """The rows of this interpreter."""
    return rows()


def test_every_row_has_a_site_and_a_text_of_fair_length(found: list[dict[str, str]]) -> None:
    assert {frozenset(row) for row in found} == {frozenset({"site", "text"})}
    assert min(len(row["text"]) for row in found) >= MIN_CHARS
    lines = [len(row["text"].splitlines()) for row in found if len(row["text"]) > MAX_CHARS]
    assert all(count == 1 for count in lines)


def test_sites_are_many_and_the_largest_are_of_one_magnitude(found: list[dict[str, str]]) -> None:
    sizes = [n for _, n in collections.Counter(row["site"] for row in found).most_common()]
    assert len(sizes) == len(PACKAGES) >= 12
    assert sizes[9] >= 300 and sizes[11] >= 150
    assert sizes[0] <= 4 * sizes[9]
    assert sizes[0] <= 2.5 * sizes[3]


def test_no_row_twice_at_a_site(found: list[dict[str, str]]) -> None:
    assert len({(row["site"], row["text"]) for row in found}) == len(found)


def test_sites_differ_in_subject(found: list[dict[str, str]]) -> None:
    """The word that marks a site is many times more frequent there than anywhere else."""
    words: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in found:
        words[row["site"]].update(re.findall(r"[a-z]+", row["text"].lower()))
    marks = {"asyncio": "loop", "email": "header", "xml": "node", "unittest": "mock"}
    for site, word in marks.items():
        share = {other: count[word] / count.total() for other, count in words.items()}
        elsewhere = [share[other] for other in marks if other != site]
        assert share[site] > 4 * max(elsewhere)


def test_order_and_content_are_the_same_in_another_process_that_imports_no_package(
    found: list[dict[str, str]],
) -> None:
    code = (
        "import hashlib, json, sys; from flower_app.data.embedded import rows; "
        "before = set(sys.modules); found = rows(); new = set(sys.modules) - before; "
        "print(hashlib.sha256(json.dumps(found).encode()).hexdigest()); print(*new)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    key, imported = run.stdout.split("\n")[:2]
    assert key == hashlib.sha256(json.dumps(found).encode()).hexdigest()
    assert imported == ""


def library(folder: Path, source: str) -> Path:
    """A made-up standard library whose packages all hold this source."""
    for package in PACKAGES:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(source, encoding="utf-8")
    return folder


SOURCE = '''"""The docstring of a module that is long enough to be a row of its own, as said."""

import sys

if sys.platform == "linux":

    @staticmethod
    def decorated(value):
        """Say what it does, in words that make the function long enough to keep."""
        return value

def short(): pass

class Thing:
    """The docstring of a class that is long enough to be a row of its own, as said."""

    async def method(self):
        """Wait, in words that make the function long enough to be kept as a row."""
        await self
'''


def test_blocks_are_docstrings_and_functions_without_their_indentation(tmp_path: Path) -> None:
    texts = [row["text"] for row in rows(library(tmp_path, SOURCE)) if row["site"] == "xml"]
    assert [text.splitlines()[0] for text in texts] == [
        "The docstring of a module that is long enough to be a row of its own, as said.",
        "@staticmethod",
        "The docstring of a class that is long enough to be a row of its own, as said.",
        "async def method(self):",
    ]
    assert all(ast.parse(text) for text in (texts[1], texts[3]))


def test_long_functions_are_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    body = "".join(f"    value_{i} = compute_something_of({i})\n" for i in range(60))
    texts = [
        row["text"]
        for row in rows(library(tmp_path, f"def long():\n{body}"))
        if row["site"] == "xml"
    ]
    assert len(texts) > 4
    assert max(map(len, texts)) <= MAX_CHARS
    assert "\n".join(texts) == f"def long():\n{body}".rstrip()


def test_tests_of_a_package_are_not_its_rows(tmp_path: Path) -> None:
    folder = library(tmp_path, SOURCE)
    (folder / "xml" / "tests").mkdir()
    extra = SOURCE.replace("docstring", "test docstring")
    (folder / "xml" / "tests" / "test_it.py").write_text(extra, encoding="utf-8")
    assert not any("test docstring" in row["text"] for row in rows(folder))


def test_a_library_without_source_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected the source .*'asyncio'.*set data.source"):
        rows(tmp_path)
