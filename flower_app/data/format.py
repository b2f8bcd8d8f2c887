"""Rows become records, as `data.format` and the column names say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from string import Formatter
from typing import Any

from datasets import ClassLabel, Dataset

from flower_app.data.config import DataConfig
from flower_app.data.source import DataError, check_columns
from models.text import Choice, Document, Instruct, Labelled, Record


def columns_in_use(config: DataConfig) -> tuple[str, ...]:
    """Columns that make the content of a row, for its format."""
    named = {
        "text": [config.text_column],
        "instruct": [config.prompt_column, config.input_column, config.answer_column],
        "choice": [
            config.prompt_column,
            config.input_column,
            *_choice_columns(config),
            config.label_column,
        ],
        "classification": [config.text_column, config.text_pair_column, config.label_column],
    }[config.format]
    return tuple(dict.fromkeys(name for name in named if name))


def make_records(rows: Dataset, config: DataConfig, labels: Sequence[str] = ()) -> list[Record]:
    """One record per row.

    `labels` names the classes in order, where labels are words. Raises DataError on a missing
    column, a null or a cell of the wrong type (with its row number, from 0), or an unknown class.
    """
    check_columns(rows, columns_in_use(config), f"rows of data.format={config.format!r}")
    makers: dict[str, Callable[[Dataset, DataConfig, Sequence[str]], list[Record]]] = {
        "text": _documents,
        "instruct": _instructs,
        "choice": _choices,
        "classification": _labelled,
    }
    return makers[config.format](rows, config, labels)


def class_names(datasets: Sequence[Dataset], config: DataConfig) -> tuple[str, ...]:
    """Names of the classes, in order: as declared, else the words sorted, or 0 to the largest.

    Truth values are `false` and `true`.
    """
    if given := config.label_names():
        return given
    for rows in datasets:
        check_columns(rows, [config.label_column], "rows of data.format='classification'")
        feature = rows.features[config.label_column]
        if isinstance(feature, ClassLabel):
            return tuple(feature.names)
    cells = [cell for rows in datasets for cell in rows[config.label_column][:]]
    if any(isinstance(cell, bool) for cell in cells):
        return ("false", "true")
    if any(isinstance(cell, str) and _number(cell) is None for cell in cells):
        return tuple(sorted({cell for cell in cells if isinstance(cell, str)}))
    numbers = [number for cell in cells if (number := _number(cell)) is not None]
    return tuple(str(number) for number in range(max(numbers, default=-1) + 1))


def _documents(rows: Dataset, config: DataConfig, labels: Sequence[str]) -> list[Record]:
    return [Document(text) for text in _texts(rows, config.text_column)]


def _instructs(rows: Dataset, config: DataConfig, labels: Sequence[str]) -> list[Record]:
    answers = _texts(rows, config.answer_column)
    pairs = zip(_prompts(rows, config), answers, strict=True)
    return [Instruct(prompt, answer) for prompt, answer in pairs]


def _choices(rows: Dataset, config: DataConfig, labels: Sequence[str]) -> list[Record]:
    records: list[Record] = []
    offered = _offered(rows, config)
    cells = rows[config.label_column][:]
    for index, prompt in enumerate(_prompts(rows, config)):
        choices = offered[index]
        # An index first, as documented, although one of the answers may be that number.
        right = _number(cells[index])
        if right is None:
            right = _named(cells[index], choices, config.label_column, index)
        if right >= len(choices):
            raise _wrong(config.label_column, index, f"an index below {len(choices)}", right)
        records.append(Choice(prompt, choices, right))
    return records


def _labelled(rows: Dataset, config: DataConfig, labels: Sequence[str]) -> list[Record]:
    texts = _texts(rows, config.text_column)
    pairs: Sequence[str | None] = [None] * len(texts)
    if config.text_pair_column:
        pairs = _texts(rows, config.text_pair_column)
    column = config.label_column
    feature = rows.features[column]
    if isinstance(feature, ClassLabel) and labels:
        cells: list[Any] = [None if c is None else feature.int2str(c) for c in rows[column][:]]
    else:
        cells = rows[column][:]
    by_name = any(_number(name) is not None for name in labels)
    numbers = [_class(cell, labels, by_name, column, row) for row, cell in enumerate(cells)]
    for row, number in enumerate(numbers):
        if labels and number >= len(labels):
            raise _wrong(column, row, f"a class below {len(labels)}", number)
    return [Labelled(*cells) for cells in zip(texts, pairs, numbers, strict=True)]


def _choice_columns(config: DataConfig) -> list[str]:
    return [name.strip() for name in config.choices_column.split(",") if name.strip()]


def _offered(rows: Dataset, config: DataConfig) -> list[tuple[str, ...]]:
    """The candidate answers of each row."""
    columns = _choice_columns(config)
    if not columns:
        names = config.label_names()
        if len(names) < 2:
            raise DataError(
                "Expected data.choices-column, or at least two data.labels as the choices of every "
                f"row, got {', '.join(names) or 'neither'}; set one of them."
            )
        return [names] * len(rows)
    if len(columns) > 1:
        return list(zip(*(_texts(rows, column) for column in columns), strict=True))
    offered = []
    for row, cell in enumerate(rows[columns[0]][:]):
        good = isinstance(cell, list) and len(cell) > 1 and all(isinstance(c, str) for c in cell)
        if not good:
            raise _wrong(columns[0], row, "a list of at least two texts", cell)
        offered.append(tuple(cell))
    return offered


def _prompts(rows: Dataset, config: DataConfig) -> list[str]:
    prompts = _texts(rows, config.prompt_column)
    inputs = [""] * len(prompts)
    if config.input_column:
        inputs = _texts(rows, config.input_column, null_as="")
    fill = prompt_maker(config.template)
    return [fill(prompt, extra) for prompt, extra in zip(prompts, inputs, strict=True)]


def prompt_maker(template: str) -> Callable[[str, str], str]:
    """Function that joins a prompt and an input as `data.template` says.

    Raises DataError for a template with other fields than these.
    """
    if not template:
        return lambda prompt, extra: f"{prompt}\n{extra}\n" if extra else f"{prompt}\n"
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        fields = {str(error)}
    if fields - {"prompt", "input"} or "prompt" not in fields:
        raise DataError(
            f"Expected data.template with {{prompt}} and perhaps {{input}} in it, got "
            f"{template!r}; write other braces doubled, as {{{{ and }}}}."
        )
    return lambda prompt, extra: template.format(prompt=prompt, input=extra)


def _texts(rows: Dataset, column: str, *, null_as: str | None = None) -> list[str]:
    texts: list[str] = []
    for row, found in enumerate(rows[column][:]):
        cell = null_as if found is None else found
        if not isinstance(cell, str):
            raise _wrong(column, row, "text", cell)
        texts.append(cell)
    return texts


def _class(cell: object, names: Sequence[str], by_name: bool, column: str, row: int) -> int:
    """The class that a cell stands for: a name of `names`, else, unless `by_name`, its number."""
    # By name first: of the classes 1 to 5, the first is 1 whether a file writes 1 or "1".
    name = str(cell).lower() if isinstance(cell, bool) else str(cell)
    if name in names:
        return list(names).index(name)
    number = _number(cell)
    if number is None or by_name:
        return _named(cell, names, column, row)
    return number


def _named(cell: object, names: Sequence[str], column: str, row: int) -> int:
    """The place of a cell among `names`."""
    if not isinstance(cell, str) and _number(cell) is None:
        raise _wrong(column, row, "a class: an integer from 0 or a name", cell)
    if not names:
        raise DataError(
            f"Expected integers in column {column!r} where data.labels is empty, got {cell!r} "
            f"in row {row}; list the class names in data.labels."
        )
    if cell not in names:
        listed = ", ".join(repr(name) for name in names[:20])
        more = ", …" if len(names) > 20 else ""
        raise _wrong(column, row, f"one of {listed}{more}", cell)
    return list(names).index(str(cell))


def _number(cell: object) -> int | None:
    """An integer from 0, which may be written as a text: csv files know nothing else."""
    if isinstance(cell, str) and re.fullmatch(r"0|[1-9][0-9]{0,17}", cell):
        return int(cell)
    return int(cell) if isinstance(cell, int) and cell >= 0 else None


def _wrong(column: str, row: int, expected: str, cell: object) -> DataError:
    got = "null" if cell is None else f"{type(cell).__name__} {str(cell)[:80]!r}"
    return DataError(
        f"Expected {expected} in column {column!r}, got {got} in row {row}; mend the row or "
        "name another column."
    )
