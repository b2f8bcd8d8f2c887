"""Every partition is reproducible, disjoint and without empty sites."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_app.data.config import DataConfig
from flower_app.data.partition import partition, site_names
from flower_app.data.source import DataError


def config(**keys: object) -> DataConfig:
    """A data section with some keys set."""
    return DataConfig.model_validate(keys)


def rows_of(column: list[object]) -> Dataset:
    """Rows with a text and the given `site` column."""
    return Dataset.from_dict({"text": [f"row {i}" for i in range(len(column))], "site": column})


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["iid", "dirichlet", "sizes"]), st.integers(1, 5), st.integers(0, 2**62))
def test_sites_are_disjoint_and_the_same_for_the_same_seed(
    kind: str, sites: int, seed: int
) -> None:
    rows = rows_of([str(index % 4) for index in range(120)])
    shares = ",".join([str(1 / sites)] * sites)
    chosen = config(partition=kind, sizes=shares, alpha=2.0)
    parts = partition(rows, chosen, sites, seed)
    assert tuple(parts) == site_names(sites)
    held = [index for part in parts.values() for index in part]
    assert sorted(held) == list(range(120))
    assert all(part and part == sorted(part) for part in parts.values())
    assert parts == partition(rows, chosen, sites, seed)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "sizes"])
def test_another_seed_gives_another_partition_and_no_global_state_is_touched(kind: str) -> None:
    rows = rows_of([str(index % 4) for index in range(120)])
    chosen = config(partition=kind, sizes="0.5,0.5")
    before = (random.getstate(), repr(np.random.get_state()))  # noqa: NPY002
    parts = [partition(rows, chosen, 2, seed) for seed in range(3)]
    assert parts[0] != parts[1] != parts[2]
    assert before == (random.getstate(), repr(np.random.get_state()))  # noqa: NPY002


def test_iid_is_even_and_sizes_are_as_given() -> None:
    rows = rows_of(["x"] * 10)
    assert [len(p) for p in partition(rows, config(partition="iid"), 3, 0).values()] == [4, 3, 3]
    chosen = config(partition="sizes", sizes="0.3,0.5,0.1")
    assert [len(p) for p in partition(rows, chosen, 3, 0).values()] == [3, 5, 1]


def test_dirichlet_skews_classes_more_when_alpha_is_small() -> None:
    rows = rows_of([index % 2 for index in range(4000)])

    def skew(alpha: float) -> float:
        total = 0.0
        for seed in range(5):
            chosen = config(partition="dirichlet", alpha=alpha)
            for part in partition(rows, chosen, 4, seed).values():
                total += abs(sum(index % 2 for index in part) / len(part) - 0.5)
        return total

    assert skew(0.1) > 2 * skew(100.0)


def test_natural_takes_the_largest_sites_ties_by_name() -> None:
    column: list[object] = ["b", "a", "c", "a", "b", "d", "a"]
    parts = partition(rows_of(column), config(), 3, 0)
    assert parts == {"a": [1, 3, 6], "b": [0, 4], "c": [2]}
    numbered: list[object] = [2, 10, 2, 10, 3]
    assert partition(rows_of(numbered), config(), 2, 5) == {"10": [1, 3], "2": [0, 2]}


def test_natural_with_too_few_values_or_a_null_is_refused() -> None:
    with pytest.raises(DataError, match=r"at least 3 different values in column 'site'.*got 2"):
        partition(rows_of(["a", "b", "a"]), config(), 3, 0)
    with pytest.raises(DataError, match=r"got null in row 1"):
        partition(rows_of(["a", None]), config(), 1, 0)


def test_missing_column_lists_those_there_are() -> None:
    rows = rows_of(["a"])
    for kind in ("natural", "dirichlet"):
        chosen = config(partition=kind, partition_column="client")
        with pytest.raises(DataError, match=r"column 'client' .*columns site, text"):
            partition(rows, chosen, 1, 0)


def test_sites_without_rows_are_refused_by_name() -> None:
    rows = rows_of(["a", "b", "a"])
    for kind in ("iid", "dirichlet"):
        with pytest.raises(DataError, match=r"site 'site-03' empty"):
            partition(rows, config(partition=kind), 5, 0)
    with pytest.raises(DataError, match=r"none at 'site-01'"):
        partition(rows, config(partition="sizes", sizes="0.9,0.1"), 2, 0)
    with pytest.raises(DataError, match=r"share for each of the 3 sites, got 2"):
        partition(rows, config(partition="sizes", sizes="0.9,0.1"), 3, 0)
    even = rows_of(["a"] * 40)
    with pytest.raises(DataError, match=r"data\.alpha=0\.001; raise data\.alpha"):
        partition(even, config(partition="dirichlet", alpha=0.001), 10, 0)


def test_own_is_for_deployed_sites() -> None:
    with pytest.raises(DataError, match=r"got 'own'; 'own' is for deployed sites"):
        partition(rows_of(["a"]), config(partition="own"), 1, 0)
    with pytest.raises(DataError, match=r"at least 1 site, got 0"):
        partition(rows_of(["a"]), config(), 0, 0)


def test_names_sort_in_order() -> None:
    for count in (1, 10, 101):
        names = site_names(count)
        assert list(names) == sorted(names) and max(Counter(names).values()) == 1
