"""How the rows of one data set lie at simulated sites."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from flower_app.data.config import DataConfig
from flower_app.data.source import DataError, check_columns

if TYPE_CHECKING:
    from flwr_datasets.partitioner.partitioner import Partitioner

ROW = "row"
"""Column in which a partitioner's part says which rows it holds."""


def partition(rows: Dataset, config: DataConfig, num_sites: int, seed: int) -> dict[str, list[int]]:
    """Site name, in order, to the ascending indices of its rows; the same for the same arguments.

    `iid`, `dirichlet` and `sizes` are flwr-datasets' partitioners, over rows shuffled by `seed`
    first, because these cut what they are given in its order. `natural` groups by column itself:
    `NaturalIdPartitioner` prints a progress bar, and takes all values where the `num_sites` largest
    are wanted (ties by name). Raises DataError on a missing column, too few values or rows, or a
    site without rows.
    """
    if num_sites < 1:
        raise DataError(f"Expected at least 1 site, got {num_sites}.")
    if config.partition == "own":
        raise DataError(
            "Expected data.partition of a simulation to be 'natural', 'iid', 'dirichlet' or "
            "'sizes', got 'own'; 'own' is for deployed sites with data-path in their node config."
        )
    if config.partition == "natural":
        return _natural(rows, config.partition_column, num_sites)
    # Its plotting imports cost more than a second, which a deployed site pays with every message.
    from flwr_datasets.partitioner import IidPartitioner, SizePartitioner

    order = np.random.default_rng(seed).permutation(len(rows))
    columns: dict[str, list[object]] = {ROW: order.tolist()}
    if config.partition == "dirichlet":
        values = natural_values(rows, config.partition_column)
        columns["class"] = [values[index] for index in order]
    names = site_names(num_sites)
    shuffled = Dataset.from_dict(columns)
    if len(rows) < num_sites:
        raise DataError(
            f"Expected at least one row per site, got {len(rows)} rows for {num_sites} sites, "
            f"which leaves site {names[len(rows)]!r} empty; use fewer sites or more rows."
        )
    if config.partition == "sizes":
        sizes = _sizes(config.fractions(), len(rows), names)
        shuffled = shuffled.select(range(sum(sizes)))
        return _parts(SizePartitioner(sizes), shuffled, names)
    if config.partition == "dirichlet":
        return _dirichlet(shuffled, config.alpha, names, seed)
    return _parts(IidPartitioner(num_sites), shuffled, names)


def site_names(num_sites: int) -> tuple[str, ...]:
    """`site-00`, `site-01`, …, as wide as needed to sort in order."""
    width = max(2, len(str(num_sites - 1)))
    return tuple(f"site-{index:0{width}d}" for index in range(num_sites))


def natural_values(rows: Dataset, column: str) -> list[str]:
    """The column as text, a value per row; raises DataError when it is missing or has a null."""
    check_columns(rows, [column], "the rows to partition")
    values = rows[column][:]
    if None in values:
        raise DataError(
            f"Expected a value in column {column!r} of every row, got null in row "
            f"{values.index(None)}; remove such rows or pick another data.partition-column."
        )
    return [str(value) for value in values]


def _natural(rows: Dataset, column: str, num_sites: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, value in enumerate(natural_values(rows, column)):
        found.setdefault(value, []).append(index)
    if len(found) < num_sites:
        raise DataError(
            f"Expected at least {num_sites} different values in column {column!r}, one per site, "
            f"got {len(found)}; use at most {len(found)} sites or another data.partition-column."
        )
    largest = sorted(found, key=lambda name: (-len(found[name]), name))[:num_sites]
    return {name: found[name] for name in sorted(largest)}


def _dirichlet(
    shuffled: Dataset, alpha: float, names: tuple[str, ...], seed: int
) -> dict[str, list[int]]:
    from flwr_datasets.partitioner import DirichletPartitioner

    # An uneven draw is wanted, an unusable one not: each site gets a quarter of an even share, or
    # ten rows if that is less; the partitioner draws again, up to ten times.
    least = max(1, min(10, len(shuffled) // (4 * len(names))))
    partitioner = DirichletPartitioner(
        num_partitions=len(names),
        partition_by="class",
        alpha=alpha,
        min_partition_size=least,
        self_balancing=False,
        shuffle=False,
        seed=seed,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _parts(partitioner, shuffled, names)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"Expected a draw with at least {least} rows at each of {len(names)} sites, got none "
            f"in ten with data.alpha={alpha}; raise data.alpha or use fewer sites."
        ) from error


def _sizes(shares: tuple[float, ...], num_rows: int, names: tuple[str, ...]) -> list[int]:
    if len(shares) != len(names):
        raise DataError(
            f"Expected data.sizes with a share for each of the {len(names)} sites, got "
            f"{len(shares)}; change data.sizes or the number of sites."
        )
    # The hair's breadth keeps 0.3 * 10 (2.9999…) at 3 rows.
    sizes = [int(share * num_rows + 1e-6) for share in shares]
    if 0 in sizes:
        raise DataError(
            f"Expected rows at every site, got none at {names[sizes.index(0)]!r} (data.sizes share "
            f"{shares[sizes.index(0)]} of {num_rows} rows); raise its share."
        )
    return sizes


def _parts(
    partitioner: Partitioner, shuffled: Dataset, names: tuple[str, ...]
) -> dict[str, list[int]]:
    partitioner.dataset = shuffled
    parts = {
        name: sorted(partitioner.load_partition(index)[ROW][:]) for index, name in enumerate(names)
    }
    for name, indices in parts.items():
        if not indices:
            raise DataError(f"Expected rows at every site, got none at {name!r}; use fewer sites.")
    return parts
