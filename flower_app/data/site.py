"""What one site holds: its records to train on, and those it is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from datasets import Dataset

from flower_app.data.config import DataConfig
from flower_app.data.format import class_names, columns_in_use, make_records
from flower_app.data.partition import natural_values, partition
from flower_app.data.source import DataError, check_columns, load_rows
from flower_app.data.split import contents, split
from models.text import Record


@dataclass(frozen=True)
class SiteRows:
    """Records of a site; `dropped_duplicates` rows are not among them, being held out too."""

    name: str
    train: list[Record]
    held_out: list[Record]
    dropped_duplicates: int


@dataclass(frozen=True)
class Simulation:
    """All sites of a simulation over one reading of the data, for where more than one is needed."""

    config: DataConfig
    num_sites: int
    seed: int

    @cached_property
    def rows(self) -> Dataset:
        """All rows, of every site."""
        rows = load_rows(self.config.source, self.config.split)
        check_columns(rows, columns_in_use(self.config), f"data.source={self.config.source!r}")
        return rows

    @cached_property
    def eval_rows(self) -> Dataset | None:
        """All rows of `data.eval-source`, or None where there is none."""
        if not self.config.eval_source:
            return None
        return load_rows(self.config.eval_source, self.config.eval_split)

    @cached_property
    def parts(self) -> dict[str, list[int]]:
        """Site name, in order, to the indices of its rows."""
        return partition(self.rows, self.config, self.num_sites, self.seed)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Class names in order, of a classification; else empty."""
        if self.config.format != "classification":
            return ()
        if names := self.config.label_names():
            return names
        return class_names([rows for rows in (self.rows, self.eval_rows) if rows], self.config)

    def site(self, name: str) -> SiteRows:
        """The rows of one site; raises DataError for a name that is none of them."""
        if name not in self.parts:
            raise DataError(f"Unknown site {name!r}. Choices: {', '.join(self.parts)}.")
        mine = self.rows.select(self.parts[name])
        if self.eval_rows is None:
            return _by_fraction(name, mine, self.config, self.seed, self.labels)
        own = self.eval_rows.select(self._eval_indices(self.eval_rows, name))
        return _by_source(
            name, mine, self.config, own_eval=own, all_eval=self.eval_rows, labels=self.labels
        )

    def _eval_indices(self, eval_rows: Dataset, name: str) -> list[int]:
        if self.config.partition == "natural":
            values = natural_values(eval_rows, self.config.partition_column)
            return [index for index, value in enumerate(values) if value == name]
        start = list(self.parts).index(name)
        return list(range(start, len(eval_rows), self.num_sites))


def simulated_sites(config: DataConfig, num_sites: int, seed: int) -> list[str]:
    """Names of the sites of a simulation, sorted; Flower's partition id indexes them."""
    return list(Simulation(config, num_sites, seed).parts)


def load_site(
    config: DataConfig,
    *,
    seed: int,
    site: str,
    num_sites: int,
    data_path: str | None = None,
    eval_path: str | None = None,
) -> SiteRows:
    """Rows of a deployed site, which has a `data_path` of its own, or of a simulated one.

    The site `site` with the same rows comes out the same either way. Held-out rows are the share
    `data.eval-fraction` of the site's own, or those of `eval_path` or, in a simulation, the site's
    part of `data.eval-source`: the rows with its name under `natural`, else every `num_sites`-th.
    Training rows whose content is held out there (in the simulation: at any site) are dropped.
    Raises DataError when nothing is left to train on, and as reading and formatting do.
    """
    if data_path is None:
        return Simulation(config, num_sites, seed).site(site)
    rows = load_rows(data_path, config.split)
    labels = config.label_names() if config.format == "classification" else ()
    if eval_path is None:
        return _by_fraction(site, rows, config, seed, labels)
    eval_rows = load_rows(eval_path, config.eval_split)
    return _by_source(site, rows, config, own_eval=eval_rows, all_eval=eval_rows, labels=labels)


def label_names(config: DataConfig) -> tuple[str, ...]:
    """Class names in order: as configured, else as found in a simulation's data; may be empty.

    Empty for other formats, and where every site has data of its own and none are configured.
    """
    if config.format != "classification":
        return ()
    if config.partition == "own":
        return config.label_names()
    return Simulation(config, 1, 0).labels


def _first(rows: Dataset, config: DataConfig) -> Dataset:
    if config.max_rows and len(rows) > config.max_rows:
        return rows.select(range(config.max_rows))
    return rows


def _by_fraction(
    name: str, rows: Dataset, config: DataConfig, seed: int, labels: tuple[str, ...]
) -> SiteRows:
    rows = _first(rows, config)
    records = make_records(rows, config, labels)
    train, held_out = split(rows, config.eval_fraction, seed, columns_in_use(config))
    if not train:
        raise DataError(
            f"Expected rows to train on at site {name!r}, got {len(rows)}, all of which "
            f"data.eval-fraction={config.eval_fraction} holds out; lower it or add rows."
        )
    return SiteRows(name, [records[i] for i in train], [records[i] for i in held_out], 0)


def _by_source(
    name: str,
    rows: Dataset,
    config: DataConfig,
    *,
    own_eval: Dataset,
    all_eval: Dataset,
    labels: tuple[str, ...],
) -> SiteRows:
    rows = _first(rows, config)
    keys = columns_in_use(config)
    records = make_records(rows, config, labels)
    held = set(contents(all_eval, keys))
    train = [
        record
        for record, content in zip(records, contents(rows, keys), strict=True)
        if content not in held
    ]
    if not train:
        raise DataError(
            f"Expected rows to train on at site {name!r}, got {len(rows)}, all of which are "
            "held-out rows too; add rows or name other held-out rows."
        )
    held_out = make_records(own_eval, config, labels)
    return SiteRows(name, train, held_out, len(records) - len(train))
