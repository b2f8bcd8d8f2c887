"""Rows are read from every kind of file, and bad ones are refused with the remedy."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset

from flower_app.data import source
from flower_app.data.source import DataError, load_rows

ROWS = [{"text": "a first row", "n": 1}, {"text": "zweite: Größe\u2028weiter", "n": 2}]


def written(folder: Path, name: str, content: str | bytes) -> str:
    """Write a file, gzipped when its name says so, and give its path."""
    data = content if isinstance(content, bytes) else content.encode()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def jsonl(rows: list[dict[str, object]]) -> str:
    """Rows as JSON lines."""
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, gz: str) -> None:
    made = Dataset.from_list(ROWS)
    wanted = ROWS if kind != "csv" else [{**row, "n": str(row["n"])} for row in ROWS]
    if kind == "parquet":
        made.to_parquet(tmp_path / "plain")
        content: str | bytes = (tmp_path / "plain").read_bytes()
    elif kind == "csv":
        content = 'text,n\n"a first row",1\n"zweite: Größe\u2028weiter",2\n'
    else:
        content = json.dumps(ROWS) if kind == "json" else jsonl([dict(row) for row in ROWS])
    assert load_rows(written(tmp_path, f"data.{kind}{gz}", content)).to_list() == wanted


def test_text_is_a_row_per_line_that_is_not_blank(tmp_path: Path) -> None:
    rows = load_rows(written(tmp_path, "a.txt", "one\r\n\n  \ntwo \u2028 still\n"))
    assert rows.to_list() == [{"text": "one"}, {"text": "two \u2028 still"}]


def test_json_lines_may_be_in_a_json_file_and_may_lack_keys(tmp_path: Path) -> None:
    rows = load_rows(written(tmp_path, "a.json", '{"a": "x"}\n\n{"b": "y", "a": null}\n'))
    assert rows.to_list() == [{"a": "x", "b": None}, {"a": None, "b": "y"}]


def test_csv_cells_stay_as_written(tmp_path: Path) -> None:
    text = 'day,code,n,note\n2024-01-01,007,-3,NA\n2024-01-02,8,10,"two\nlines"\n'
    rows = load_rows(written(tmp_path, "a.csv", text)).to_list()
    assert rows == [
        {"day": "2024-01-01", "code": "007", "n": "-3", "note": "NA"},
        {"day": "2024-01-02", "code": "8", "n": "10", "note": "two\nlines"},
    ]


def test_csv_may_begin_with_blank_lines(tmp_path: Path) -> None:
    rows = load_rows(written(tmp_path, "a.csv", "\n\r\ntext,n\nhello,5\n"))
    assert rows.to_list() == [{"text": "hello", "n": "5"}]


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", b"\xef\xbb\xbftext\nhello\n")
    assert load_rows(path).column_names == ["text"]


def test_folder_takes_the_files_of_the_split_or_all(tmp_path: Path) -> None:
    written(tmp_path, "train-00.jsonl", '{"text": "t0"}')
    written(tmp_path, "train-01.jsonl.gz", '{"text": "t1"}')
    written(tmp_path, "validation.jsonl", '{"text": "v"}')
    written(tmp_path, "README.md", "not data")
    assert load_rows(str(tmp_path))["text"][:] == ["t0", "t1"]
    assert load_rows(str(tmp_path), "validation")["text"][:] == ["v"]
    with pytest.raises(DataError, match=r"split 'test' .* got train, validation"):
        load_rows(str(tmp_path), "test")
    other = tmp_path / "other"
    written(other, "b.txt", "b")
    written(other, "a.txt", "a")
    written(other, ".hidden/c.txt", "c")
    assert load_rows(str(other))["text"][:] == ["a", "b"]


def test_files_beside_those_of_a_split_are_not_left_out_in_silence(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", '{"text": "t"}')
    for name in ("notes.jsonl", "more/trainees.jsonl"):
        written(tmp_path, name, '{"text": "n"}')
    with pytest.raises(
        DataError, match=r"as train\.jsonl is, got also more/trainees.*notes\.jsonl;"
    ):
        load_rows(str(tmp_path))
    for at in range(12):
        written(tmp_path, f"note-{at:02d}.txt", "n")
    with pytest.raises(DataError, match=r"note-08\.txt and 4 more; rename"):
        load_rows(str(tmp_path))


def test_folder_with_different_columns_or_types_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "a.jsonl", '{"text": "a"}')
    written(tmp_path, "b.jsonl", '{"body": "b"}')
    with pytest.raises(DataError, match=r"columns text of a\.jsonl .* got body in b\.jsonl"):
        load_rows(str(tmp_path))
    written(tmp_path, "b.jsonl", '{"text": 3}')
    with pytest.raises(DataError, match=r"same types in every file"):
        load_rows(str(tmp_path))


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "README.md", "nothing")
    with pytest.raises(DataError, match=r"Expected \.csv, .* files in the folder"):
        load_rows(str(tmp_path))


def test_missing_path_says_what_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"found nothing .looked for .*gone.jsonl.; check the path"):
        load_rows(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match=rf"'data/gone.csv'.*{tmp_path}/data/gone.csv"):
        load_rows("data/gone.csv")


def test_non_utf8_names_the_file_and_the_place(tmp_path: Path) -> None:
    for name in ("bad.txt", "bad.jsonl", "bad.csv.gz"):
        path = written(tmp_path, name, b"caf\xe9 noir\n")
        with pytest.raises(DataError, match=rf"UTF-8 in .*{name}.* 0xe9 at offset 3; convert"):
            load_rows(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "b.txt.gz"])
def test_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"Expected rows in .*, found none"):
        load_rows(written(tmp_path, name, "\n"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pdf", b"%PDF", r"ending in \.csv, .*got .*a\.pdf"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', "line 2 is list, expected an object"),
        ("a.json", b"[1]", "item 1 is int"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x"}\n', "column 'a' mixes types"),
        ("a.csv", b"a,b\n1,2\n3\n", "Expected 2 columns, got 1"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"got .*a\.csv: the column name 'a' stands there twice"),
        ("a.csv", b"a" * 200_000 + b"\n1\n", r"readable \.csv file, got .*a\.csv: field larger"),
        ("a.jsonl", b'{"n": 1}\n{"n": 18446744073709551616}\n', r"a\.jsonl: column 'n' .* 64 bits"),
        ("a.json", b"[" * 100_000, r"readable \.json file, got .*a\.json"),
        ("a.parquet", b"PAR0nothing", r"readable \.parquet file"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_rows(written(tmp_path, name, content))


def test_broken_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}' * 50)[:-9])
    with pytest.raises(DataError, match=r"readable .jsonl file"):
        load_rows(str(path))


def test_hub_data_set_is_asked_for_by_name_subset_and_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def fake(name: str, subset: str | None, *, split: str) -> Dataset:
        asked.append((name, subset, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such data set")
        return Dataset.from_list(ROWS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "load_dataset", fake)
    assert load_rows("owner/some.name:sub", "test").to_list() == ROWS
    load_rows("imdb")
    assert asked == [("owner/some.name", "sub", "test"), ("imdb", None, "train")]
    with pytest.raises(DataError, match=r"FileNotFoundError: no such data set; check the name"):
        load_rows("nobody/nothing")


def test_embedded_rows_come_from_their_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("flower_app.data.embedded")
    fake.rows = lambda: [{"site": "json", "text": "x"}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flower_app.data.embedded", fake)
    monkeypatch.setattr("flower_app.data.embedded", fake, raising=False)
    assert load_rows("embedded").to_list() == [{"site": "json", "text": "x"}]
