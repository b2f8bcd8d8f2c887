"""`data.*`: where rows come from, how they read, and how they lie at the sites."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.section import ConfigError, Section


class DataConfig(Section):
    """`data.*`: source, format, and distribution over sites."""

    source: str = Field(
        "embedded",
        description="`embedded`, a hub data set id, or a json, jsonl, csv, parquet or text file "
        "(also gzipped) or a folder of such files. Each line of a text file is a row of its own: "
        "write notes of several lines as jsonl or parquet. Sites with `data-path` in their node "
        "config ignore it.",
    )
    split: str = Field(
        "train",
        min_length=1,
        description="Split to take of a hub data set, or of a folder with files named by split "
        "(all of them or none).",
    )
    eval_source: str = Field(
        "",
        description="Held-out rows from a source of their own, divided over the simulated sites; "
        "empty holds out `eval-fraction` of each site's rows. Deployed sites: `eval-path`.",
    )
    eval_split: str = Field(
        "validation", min_length=1, description="Split to take of `eval-source`, as `split`."
    )
    max_rows: int = Field(
        0, ge=0, description="Keep the first rows only, of each site; 0 keeps all."
    )
    format: Literal["text", "instruct", "choice", "classification"] = Field(
        "text", description="How a row becomes an example."
    )
    text_column: str = Field("text", description="Text of `text` and `classification` rows.")
    text_pair_column: str = Field("", description="Second text of a `classification` row, if any.")
    prompt_column: str = Field("instruction", description="Prompt of `instruct` and `choice` rows.")
    input_column: str = Field(
        "", description="Further input of an `instruct` or `choice` row, if any; may be empty."
    )
    answer_column: str = Field(
        "output", description="Answer of an `instruct` row, on which alone the loss is counted."
    )
    choices_column: str = Field(
        "choices",
        description="List of answers of a `choice` row, or several columns with one each, "
        "comma-separated; empty offers `labels` as answers of every row.",
    )
    label_column: str = Field(
        "label", description="Class of a `classification` row, index of the right `choice`."
    )
    labels: str = Field(
        "",
        description="Comma-separated class names, in order; needed by deployed sites whose labels "
        "are words. Empty: integers as they are, also those in csv files, words sorted, truth "
        "values as false,true. A cell is looked for among the names first and is an index "
        "otherwise.",
    )
    template: str = Field(
        "",
        description="Prompt with {prompt} and {input} in it; empty joins the two with a line "
        "break each.",
    )
    partition: Literal["natural", "iid", "dirichlet", "sizes", "own"] = Field(
        "natural",
        description="How rows lie at simulated sites: by `partition-column`, evenly, by a "
        "Dirichlet draw over `partition-column`, by the given `sizes`; `own`: every "
        "site names its own path in its node config.",
    )
    partition_column: str = Field(
        "site", description="Column of `natural` (the site) and `dirichlet` (the class)."
    )
    alpha: float = Field(0.5, gt=0, description="Concentration of `dirichlet`; small is uneven.")
    sizes: str = Field(
        "", description="Comma-separated fractions of the rows per site, for `sizes`."
    )
    eval_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of each site's rows held out of training."
    )

    def check(self) -> None:
        """Refuse settings that contradict each other; raises ConfigError."""
        if self.partition == "sizes":
            self.fractions()
        if self.partition in ("natural", "dirichlet") and not self.partition_column:
            raise ConfigError(
                f"Expected data.partition-column with data.partition={self.partition!r}, got "
                "nothing; name the column that tells the sites apart."
            )

    def fractions(self) -> tuple[float, ...]:
        """Shares of `sizes`, each above 0 and summing to at most 1; raises ConfigError."""
        try:
            shares = tuple(float(part) for part in self.sizes.split(","))
        except ValueError:
            shares = ()
        if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
            raise ConfigError(
                "Expected data.sizes as comma-separated fractions above 0 that sum to at most 1, "
                f"got {self.sizes!r}; write for example '0.5,0.3,0.2'."
            )
        return shares

    def label_names(self) -> tuple[str, ...]:
        """Class names of `labels`, in order; empty when not given."""
        return tuple(name.strip() for name in self.labels.split(",") if name.strip())
