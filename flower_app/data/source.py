"""Rows from wherever a configuration says they are."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, concatenate_datasets, load_dataset

from models.paths import located

SPLITS = ("train", "validation", "valid", "val", "dev", "test")
"""Beginnings of file names that tell the splits of a folder apart."""


class DataError(ValueError):
    """Data that cannot be used: says what was expected, what came and what to do."""


def load_rows(source: str, split: str = "train") -> Dataset:
    """All rows of `embedded`, a file, a folder of files, or a hub data set.

    Files are json, jsonl, csv, parquet or text (a row per line that is not blank, column `text`),
    gzipped or not. Of a folder whose files are named by split (`train.jsonl`, `test.csv`), those of
    `split` are taken, of one where none is, all. A hub data set may name its subset as
    `owner/name:subset`. Local files are read straight into memory, so no copy of a site's rows
    stays behind in a cache.
    Raises DataError on a missing path, a file that cannot be read or is of no split, or no rows.
    """
    if source == "embedded":
        # Imported here, since building the rows reads a good part of the standard library.
        from flower_app.data import embedded

        rows = Dataset.from_list(list(embedded.rows()))
    elif (path := located(source)).exists():
        rows = _read_folder(path, split) if path.is_dir() else _read_file(path)
    elif _looks_like_path(source):
        raise DataError(
            f"Expected a file or folder at {source!r}, found nothing (looked for "
            f"{path.absolute()}); check the path, or name a hub data set as 'owner/name'."
        )
    else:
        rows = _read_hub(source, split)
    if len(rows) == 0:
        raise DataError(f"Expected rows in {source!r}, found none; give it at least two.")
    return rows


def check_columns(rows: Dataset, columns: Sequence[str], what: str) -> None:
    """Raise DataError, listing the columns there are, if one of `columns` is missing."""
    if missing := [column for column in columns if column not in rows.column_names]:
        raise DataError(
            f"Expected a column {missing[0]!r} in {what}, got the columns "
            f"{', '.join(sorted(rows.column_names))}; set the data.*-column keys to these."
        )


def _looks_like_path(source: str) -> bool:
    named = _suffix(Path(source)) in READERS
    return named or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source)


def _suffix(path: Path) -> str:
    """Last suffix in lower case, that of the content where it is gzipped."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _read_hub(source: str, split: str) -> Dataset:
    name, _, subset = source.partition(":")
    try:
        rows = load_dataset(name, subset or None, split=split)
    except Exception as error:  # The library raises whatever its many parts raise.
        raise DataError(
            f"Expected a path or a hub data set with a split {split!r}, got {source!r}, of which "
            f"there is no such path ({Path(source).absolute()}) and which the hub did not yield: "
            f"{type(error).__name__}: {error}; check the name, data.split and the network."
        ) from error
    if not isinstance(rows, Dataset):
        raise DataError(f"Expected one split of {source!r}, got {split!r}; name a single split.")
    return rows


def _read_folder(folder: Path, split: str) -> Dataset:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and _suffix(path) in READERS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"Expected {', '.join(sorted(READERS))} files in the folder {folder}, found none; "
            "put some there or name a file."
        )
    of_split = {path: found for path in files if (found := _split_of(path)) is not None}
    if of_split:
        _check_all_named(folder, files, of_split)
        files = [path for path, found in of_split.items() if found == split]
    if not files:
        raise DataError(
            f"Expected files of the split {split!r} in the folder {folder}, got "
            f"{', '.join(sorted(set(of_split.values())))}; set data.split or name a file."
        )
    parts = [_read_file(path) for path in files]
    for path, part in zip(files, parts, strict=True):
        if set(part.column_names) != set(parts[0].column_names):
            raise DataError(
                f"Expected the columns {', '.join(parts[0].column_names)} of {files[0].name} in "
                f"every file of {folder}, got {', '.join(part.column_names)} in {path.name}; "
                "name the file to take."
            )
    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"Expected the same types in every file of {folder}: {error}; cells of csv files are "
            "texts, so write texts in the others too, or name the file to take."
        ) from error


def _check_all_named(folder: Path, files: Sequence[Path], named: Mapping[Path, str]) -> None:
    """Refuse files beside those of a split, which nobody would notice to be missing."""
    others = [str(path.relative_to(folder)) for path in files if path not in named]
    if others:
        listed = ", ".join(others[:10]) + (f" and {len(others) - 10} more" if others[10:] else "")
        split_file = next(iter(named)).relative_to(folder)
        raise DataError(
            f"Expected all files or none in the folder {folder} to be named by split "
            f"({', '.join(SPLITS)}), as {split_file} is, got also {listed}; rename or move these, "
            "or name the file to take."
        )


def _split_of(path: Path) -> str | None:
    stem = re.split(r"[._-]", path.name.lower(), maxsplit=1)[0]
    return stem if stem in SPLITS else None


def _read_file(path: Path) -> Dataset:
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise DataError(
            f"Expected a file ending in {', '.join(sorted(READERS))} (or one of these and .gz), "
            f"got {path}; rename or convert it."
        )
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        return Dataset(_distinct(reader(content)))
    except UnicodeDecodeError as error:
        raise DataError(
            f"Expected UTF-8 in {path}, got the byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}; convert it, for example with iconv -t UTF-8."
        ) from error
    except (
        OSError, EOFError, ValueError, TypeError, RecursionError, csv.Error, zlib.error,
        pa.ArrowException,
    ) as error:  # fmt: skip
        raise DataError(f"Expected a readable {_suffix(path)} file, got {path}: {error}") from error


def _distinct(table: pa.Table) -> pa.Table:
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the column name {twice[0]!r} stands there twice; rename one of the two")
    return table


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig")


def _read_json(content: bytes) -> pa.Table:
    text = _text(content)
    if text.lstrip()[:1] != "[":
        return _read_jsonl(content)
    return _table([_object(row, f"item {at}") for at, row in enumerate(json.loads(text), 1)])


def _read_jsonl(content: bytes) -> pa.Table:
    rows = []
    # Not splitlines(), which also splits at the U+2028 that JSON allows within a string.
    for number, line in enumerate(_text(content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        rows.append(_object(value, f"line {number}"))
    return _table(rows)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{where} is {type(value).__name__}, expected an object with columns")
    return value


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except pa.ArrowException as error:
            raise ValueError(f"column {name!r} mixes types ({error})") from error
        except OverflowError as error:
            raise ValueError(
                f"column {name!r} has an integer of more than 64 bits; write it as a text"
            ) from error
    return pa.table(columns)


def _read_csv(content: bytes) -> pa.Table:
    text = _text(content)
    # Like pyarrow, past the blank lines that a file may begin with.
    names = next((row for row in csv.reader(io.StringIO(text)) if row), None)
    if names is None:
        return pa.table({})
    return pyarrow.csv.read_csv(
        io.BytesIO(text.encode()),
        read_options=pyarrow.csv.ReadOptions(block_size=len(content) + 1),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        # As written: "NA", "2024-01-01", "007" and "5" in a text must stay what they are, and an
        # answer or a class that is a number must be the same as in a JSON file with texts.
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )


def _read_parquet(content: bytes) -> pa.Table:
    return pyarrow.parquet.read_table(io.BytesIO(content))


def _read_text(content: bytes) -> pa.Table:
    lines = (line.removesuffix("\r") for line in _text(content).split("\n"))
    return pa.table({"text": pa.array([line for line in lines if line.strip()], pa.string())})


READERS: Mapping[str, Callable[[bytes], pa.Table]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".text": _read_text,
}
"""Suffix of a file to the function that reads its bytes."""
