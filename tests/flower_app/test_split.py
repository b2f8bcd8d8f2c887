"""The same content is on the same side of the split, wherever it turns up."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_app.data.source import DataError
from flower_app.data.split import contents, split


def rows_of(texts: list[str]) -> Dataset:
    """Rows of the texts, with a column that is not in use."""
    return Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=3), min_size=1, max_size=30),
    st.floats(0, 0.99),
    st.integers(0, 9),
    st.randoms(use_true_random=False),
)
def test_a_content_is_on_one_side_in_any_order_and_company(
    texts: list[str], fraction: float, seed: int, order: object
) -> None:
    train, held_out = split(rows_of(texts), fraction, seed, ["text"])
    assert sorted(train + held_out) == list(range(len(texts)))
    side = {texts[index]: False for index in train} | {texts[index]: True for index in held_out}
    assert not {texts[i] for i in train} & {texts[i] for i in held_out}
    mixed = [*texts, "another row", *texts]
    order.shuffle(mixed)  # type: ignore[attr-defined]
    _, again = split(rows_of(mixed), fraction, seed, ["text"])
    held = set(again)
    for index, text in enumerate(mixed):
        assert text not in side or side[text] == (index in held)


def test_share_is_about_the_fraction_and_changes_with_the_seed() -> None:
    rows = rows_of([f"row {index}" for index in range(5000)])
    sides = [split(rows, 0.2, seed, ["text"])[1] for seed in (0, 1)]
    for held_out in sides:
        assert 0.18 < len(held_out) / 5000 < 0.22  # five standard deviations are 0.028
    assert 0.15 < len(set(sides[0]) & set(sides[1])) / 1000 < 0.25


def test_larger_fraction_holds_out_the_same_rows_and_more() -> None:
    rows = rows_of([f"row {index}" for index in range(500)])
    small, large = (set(split(rows, f, 0, ["text"])[1]) for f in (0.1, 0.3))
    assert small < large
    assert split(rows, 0.0, 0, ["text"])[1] == []


def test_contents_tell_cells_apart() -> None:
    rows = Dataset.from_dict({"a": ["x, y", "x", "x"], "b": ["z", "y, z", "y, z"]})
    found = contents(rows, ["a", "b"])
    assert found[0] != found[1] == found[2]
    with pytest.raises(DataError, match=r"column 'c' .*columns a, b"):
        contents(rows, ["c"])
