"""Rows become the records that the configuration describes, or an error names the row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from flower_app.data.config import DataConfig
from flower_app.data.format import class_names, columns_in_use, make_records
from flower_app.data.source import DataError, load_rows
from models.text import Choice, Document, Instruct, Labelled


def config(**keys: object) -> DataConfig:
    """A data section with some keys set."""
    return DataConfig.model_validate(keys)


def test_text() -> None:
    rows = Dataset.from_dict({"body": ["a", ""]})
    assert make_records(rows, config(text_column="body")) == [Document("a"), Document("")]


def test_instruct_joins_prompt_and_input_by_line_breaks() -> None:
    rows = Dataset.from_dict(
        {"instruction": ["Add.", "Say hi."], "input": ["1 2", None], "output": ["3", "hi"]}
    )
    records = make_records(rows, config(format="instruct", input_column="input"))
    assert records == [Instruct("Add.\n1 2\n", "3"), Instruct("Say hi.\n", "hi")]
    assert make_records(rows, config(format="instruct"))[0] == Instruct("Add.\n", "3")


def test_template_frames_the_prompt_and_leaves_braces_of_rows_alone() -> None:
    rows = Dataset.from_dict({"instruction": ["use {x}"], "input": ["{0}"], "output": ["y"]})
    chosen = config(format="instruct", input_column="input", template="Q {prompt} {{}} {input} A:")
    assert make_records(rows, chosen) == [Instruct("Q use {x} {} {0} A:", "y")]


@pytest.mark.parametrize("template", ["no field", "{prompt} {other}", "{prompt", "{}", "{input}"])
def test_bad_template_is_refused(template: str) -> None:
    rows = Dataset.from_dict({"instruction": ["a"], "output": ["y"]})
    with pytest.raises(DataError, match=r"Expected data.template with {prompt}"):
        make_records(rows, config(format="instruct", template=template))


def test_choice_from_a_list_from_columns_and_from_labels() -> None:
    rows = Dataset.from_dict(
        {
            "instruction": ["q"],
            "choices": [["no", "yes"]],
            "c1": ["no"],
            "c2": ["yes"],
            "label": [1],
            "word": ["yes"],
            "truth": [True],
        }
    )
    wanted = [Choice("q\n", ("no", "yes"), 1)]
    assert make_records(rows, config(format="choice")) == wanted
    for keys in (
        {"choices_column": "c1, c2"},
        {"choices_column": "c1,c2", "label_column": "word"},
        {"choices_column": "", "labels": "no,yes", "label_column": "truth"},
    ):
        assert make_records(rows, config(format="choice", **keys)) == wanted


@pytest.mark.parametrize(
    ("choices", "label", "says"),
    [
        (["a"], 0, "list of at least two texts in column 'choices', got list .* in row 0"),
        (["a", "b"], 2, "an index below 2 in column 'label', got int '2' in row 0"),
        (["a", "b"], -1, "a class: an integer from 0"),
        (["a", "b"], "c", "one of 'a', 'b' in column 'label', got str 'c' in row 0"),
    ],
)
def test_bad_choice_is_refused(choices: list[str], label: object, says: str) -> None:
    rows = Dataset.from_dict({"instruction": ["q"], "choices": [choices], "label": [label]})
    with pytest.raises(DataError, match=says):
        make_records(rows, config(format="choice"))
    with pytest.raises(DataError, match=r"or at least two data.labels"):
        make_records(rows, config(format="choice", choices_column="", labels="one"))


def test_classification_by_number_by_word_and_with_a_pair() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "other": ["c", "d"], "label": [1, 0]})
    chosen = config(format="classification")
    assert make_records(rows, chosen) == [Labelled("a", None, 1), Labelled("b", None, 0)]
    words = Dataset.from_dict({"text": ["a", "b"], "other": ["c", "d"], "label": ["y", "x"]})
    paired = config(format="classification", text_pair_column="other")
    assert class_names([words], paired) == ("x", "y")
    assert make_records(words, paired, ("x", "y")) == [Labelled("a", "c", 1), Labelled("b", "d", 0)]


def test_csv_and_json_lines_hold_the_same_classes(tmp_path: Path) -> None:
    """One of two sites has a csv file, the other json with texts or with integers."""
    stars = [("a", 1), ("b", 4), ("c", 5)]
    lines = {
        "a.csv": ["text,label", *(f"{text},{star}" for text, star in stars)],
        "b.jsonl": [json.dumps({"text": text, "label": str(star)}) for text, star in stars],
        "c.jsonl": [json.dumps({"text": text, "label": star}) for text, star in stars],
    }
    read = {}
    for name, content in lines.items():
        (tmp_path / name).write_text("\n".join(content), encoding="utf-8")
        read[name] = load_rows(str(tmp_path / name))
    chosen = config(format="classification")
    for labels, wanted in (
        (("1", "2", "3", "4", "5"), [0, 3, 4]),  # by name
        (("a", "b", "c", "d", "e", "f"), [1, 4, 5]),  # by number
        ((), [1, 4, 5]),
    ):
        for name, rows in read.items():
            records = make_records(rows, chosen, labels)
            assert [r.label for r in records if isinstance(r, Labelled)] == wanted, (labels, name)
    names = {class_names([rows], chosen) for rows in read.values()}
    assert names == {("0", "1", "2", "3", "4", "5")}


def test_a_number_that_is_no_name_is_refused_where_names_are_numbers() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    with pytest.raises(DataError, match=r"one of '1', '2' in column 'label', got int '0' in row 1"):
        make_records(rows, config(format="classification"), ("1", "2"))


def test_truth_values_are_found_by_name_before_they_count_as_numbers() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [True, False]})
    chosen = config(format="classification")
    assert [r.label for r in make_records(rows, chosen, ("true", "false"))] == [0, 1]  # type: ignore[union-attr]
    assert [r.label for r in make_records(rows, chosen, ("no", "yes"))] == [1, 0]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="one of '0', '1' in column 'label', got bool 'True'"):
        make_records(rows, chosen, ("0", "1"))


def test_truth_values_are_classes_where_none_are_declared() -> None:
    chosen = config(format="classification")
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [True, False]})
    found = class_names([rows, rows.select([0])], chosen)
    assert found == ("false", "true")
    assert [r.label for r in make_records(rows, chosen, found)] == [1, 0]  # type: ignore[union-attr]
    assert class_names([rows.select([0])], chosen) == ("false", "true")


def test_numbers_in_csv_are_answers_and_indices(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("instruction,output,a,b,label\n2+3?,5,1,5,1\n1+0?,1,1,0,0\n", encoding="utf-8")
    rows = load_rows(str(path))
    assert make_records(rows, config(format="instruct")) == [
        Instruct("2+3?\n", "5"),
        Instruct("1+0?\n", "1"),
    ]
    # The label is an index, although one of the answers reads like it.
    assert make_records(rows, config(format="choice", choices_column="a,b")) == [
        Choice("2+3?\n", ("1", "5"), 1),
        Choice("1+0?\n", ("1", "0"), 0),
    ]


def test_declared_class_names_of_a_data_set_are_used() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
    rows = Dataset.from_dict({"text": ["t"], "label": [1]}, features=features)
    chosen = config(format="classification")
    assert class_names([rows], chosen) == ("z", "a")
    assert make_records(rows, chosen, ("a", "z")) == [Labelled("t", None, 0)]


def test_class_names_as_given_as_words_and_as_numbers() -> None:
    chosen = config(format="classification")
    words = [Dataset.from_dict({"label": ["b", "a"]}), Dataset.from_dict({"label": ["c"]})]
    assert class_names(words, chosen) == ("a", "b", "c")
    assert class_names(words, config(labels="c, b,a")) == ("c", "b", "a")
    assert class_names([Dataset.from_dict({"label": [0, 3]})], chosen) == ("0", "1", "2", "3")


def test_unknown_or_unnamed_class_is_refused() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "q"]})
    chosen = config(format="classification")
    with pytest.raises(DataError, match=r"one of 'x', 'y' .* got str 'q' in row 1"):
        make_records(rows, chosen, ("x", "y"))
    with pytest.raises(DataError, match=r"list the class names in data.labels"):
        make_records(rows, chosen)
    numbers = Dataset.from_dict({"text": ["a"], "label": [2]})
    with pytest.raises(DataError, match=r"a class below 2 .* row 0"):
        make_records(numbers, chosen, ("x", "y"))


def test_null_and_wrong_cells_name_the_row() -> None:
    rows = Dataset.from_dict({"text": ["a", None], "label": [0, 1]})
    with pytest.raises(DataError, match=r"text in column 'text', got null in row 1"):
        make_records(rows, config())
    with pytest.raises(DataError, match=r"text in column 'label', got int '0' in row 0"):
        make_records(rows, config(text_column="label"))
    broken = Dataset.from_dict({"text": ["a"], "label": [None]})
    with pytest.raises(DataError, match=r"a class: .* got null in row 0"):
        make_records(broken, config(format="classification"))


@pytest.mark.parametrize("kind", ["text", "instruct", "choice", "classification"])
def test_missing_column_lists_those_there_are(kind: str) -> None:
    rows = Dataset.from_dict({"one": ["a"], "two": ["b"]})
    with pytest.raises(DataError, match=r"Expected a column .* got the columns one, two"):
        make_records(rows, config(format=kind))


def test_columns_in_use_are_those_of_the_format() -> None:
    assert columns_in_use(config()) == ("text",)
    chosen = config(format="instruct", input_column="input")
    assert columns_in_use(chosen) == ("instruction", "input", "output")
    chosen = config(format="choice", choices_column="a,b")
    assert columns_in_use(chosen) == ("instruction", "a", "b", "label")
