"""Read a run folder, finished or still growing, into one `Run`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_app.report.numbers import number

Row = Mapping[str, Any]


class ReportError(ValueError):
    """A folder of which no report can be made."""


@dataclass(frozen=True)
class Run:
    """All that the report shows; `summary` has the same keys whether the run has ended or not."""

    finished: bool
    summary: Row
    evaluations: tuple[Row, ...]
    rounds: tuple[Row, ...]
    replies: tuple[Row, ...]
    local: Mapping[str, Row]
    central: Row | None
    config_text: str
    unread_lines: int
    attack: Row | None = None

    @property
    def metric(self) -> str:
        """Name of the task's metric: `perplexity` or `accuracy`."""
        return str(self.summary["metric"])

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all sites seen, sorted."""
        return tuple(sorted(str(name) for name in self.summary["sites"]))

    @property
    def personal(self) -> tuple[Row, ...]:
        """Evaluations of the sites' personal models, in order of rounds."""
        return tuple(
            {**found, "round": row["round"]}
            for row in self.evaluations
            if isinstance(found := row.get("personal"), Mapping)
        )

    def per_site(self, evaluation: Row | None) -> Mapping[str, Row]:
        """The figures of each site in one evaluation; entries that are no figures are left out."""
        found = (evaluation or {}).get("per_site")
        entries = found.items() if isinstance(found, Mapping) else ()
        return {str(site): row for site, row in entries if isinstance(row, Mapping)}

    def left_out(self) -> list[tuple[int, str, str, str]]:
        """Replies that did not count: round, site, status and reason, each once, in order."""
        rows = {
            (row["round"], str(row["site"]), str(row.get("reason") or "")): str(row["status"])
            for row in self.replies
            if row.get("status", "ok") != "ok"
        }
        for row in self.summary.get("quarantined") or ():
            # As a rule these are the replies above once more; metrics.jsonl may be lost or cut.
            key = (int(row.get("round", 0)), str(row.get("site")), str(row.get("reason") or ""))
            rows.setdefault(key, str(row.get("status", "quarantined")))
        return sorted((r, site, status, reason) for (r, site, reason), status in rows.items())


def read_run(folder: Path) -> Run:
    """Read `metrics.jsonl`, `summary.json` and `config.toml`, as far as they are there.

    Raises ReportError if none is there, or if `summary.json` is not a JSON object.
    """
    names = ("metrics.jsonl", "summary.json", "config.toml")
    if not any((folder / name).is_file() for name in names):
        raise ReportError(
            f"Expected a run folder with {', '.join(names)}, got {str(folder)!r} without any of "
            "them; name the folder of one run, for example runs/latest."
        )
    rows, unread = _rows(_text(folder / "metrics.jsonl"))
    config_text = _text(folder / "config.toml")
    written = _summary(folder / "summary.json")
    evaluations = _latest(rows, "evaluation", ("round",))
    baselines = [row for row in rows if row.get("kind") == "baseline"]
    replies = _latest([row for row in rows if "site" in row], "site", ("round", "site"))
    rounds = _latest(rows, "round", ("round",))
    local = {str(r["site"]): r for r in baselines if r.get("name") == "local" and "site" in r}
    central = next((r for r in reversed(baselines) if r.get("name") == "central"), None)
    if rounds and written and rounds[-1]["round"] > (number(written, "rounds") or 0):
        written = None  # the summary of an earlier end, after which the run was resumed
    grown = _so_far(
        config_text=config_text,
        evaluations=evaluations,
        rounds=rounds,
        replies=replies,
        local=local,
        central=central,
    )
    return Run(
        finished=written is not None,
        summary=grown if written is None else _merged(grown, written),
        evaluations=evaluations,
        rounds=rounds,
        replies=replies,
        local=local,
        central=central,
        config_text=config_text,
        unread_lines=unread,
        attack=next((row for row in reversed(rows) if row.get("kind") == "attack"), None),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _summary(path: Path) -> Row | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        found = error
    if not isinstance(found, dict):
        raise ReportError(
            f"Expected {str(path)!r} to hold one JSON object, got {found!r}; remove the file to "
            "report on metrics.jsonl alone."
        )
    return found


def _rows(text: str) -> tuple[list[Row], int]:
    """All JSON objects, and the number of lines that are none (a killed run may cut its last)."""
    rows: list[Row] = []
    unread = 0
    for line in text.split("\n"):  # a string in JSON may hold other line separators
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("round", 0), int):
            rows.append(row)
        else:
            unread += 1
    return rows, unread


def _latest(rows: Iterable[Row], kind: str, keys: tuple[str, ...]) -> tuple[Row, ...]:
    """Rows of one kind by round; of a round that a resumed run did again, the later rows."""
    found = {
        (row["round"], *(str(row[key]) for key in keys[1:])): row
        for row in rows
        if row.get("kind") == kind and "round" in row
    }
    return tuple(found[key] for key in sorted(found))


def _merged(grown: Row, written: Row) -> Row:
    """What is written, with the results on own rows added where only metrics.jsonl has them."""
    merged = {**grown, **written}
    for key in ("zero_shot", "federated"):
        if isinstance(merged[key], Mapping) and isinstance(grown[key], Mapping):
            own = {name: value for name, value in grown[key].items() if name.startswith("own_")}
            merged[key] = {**own, **merged[key]}
    return merged


def _so_far(
    *,
    config_text: str,
    evaluations: tuple[Row, ...],
    rounds: tuple[Row, ...],
    replies: tuple[Row, ...],
    local: Mapping[str, Row],
    central: Row | None,
) -> dict[str, Any]:
    """What `summary.json` would say by now; keys that only its writer can know are left out."""
    config = _config(config_text)
    metric = "accuracy" if any("accuracy" in row for row in evaluations) else "perplexity"
    sites = {str(row["site"]) for row in replies} | set(local)
    for row in evaluations:
        sites |= {str(site) for site in row.get("per_site") or {}}
    first = evaluations[0] if evaluations and evaluations[0]["round"] == 0 else None
    last = evaluations[-1] if evaluations and evaluations[-1]["round"] > 0 else None
    keys = ("loss", metric, "own_loss", f"own_{metric}")
    return {
        "name": config.get("run", {}).get("name", "run"),
        "metric": metric,
        "seed": config.get("run", {}).get("seed"),
        "rounds": config.get("run", {}).get("rounds"),
        "sites": sorted(sites),
        "model": config.get("model", {}).get("name"),
        "task": config.get("model", {}).get("task"),
        "payload": config.get("payload", {}).get("kind"),
        "rule": config.get("strategy", {}).get("rule"),
        "secure_aggregation": config.get("secure", {}).get("aggregation", "none"),
        "zero_shot": _with_own(first, metric),
        "local": {key: _mean(local.values(), key) for key in keys} if local else None,
        "federated": _with_own(last, metric),
        "personal": _with_own((last or {}).get("personal"), metric),
        "central": central,
        "bytes_down_per_round": _mean(rounds, "bytes_down"),
        "bytes_up_per_round": _mean(rounds, "bytes_up"),
        "product_gap": _mean(rounds, "product_gap"),
        "privacy": {"unit": config.get("privacy", {}).get("unit", "none")},
        "wall_s": sum(number(row, "wall_s") or 0.0 for row in rounds) if rounds else None,
    }


def _with_own(evaluation: Row | None, metric: str) -> Row | None:
    """An evaluation with the means over the sites of its values on each site's own rows."""
    if not isinstance(evaluation, Mapping):
        return None
    per_site = evaluation.get("per_site")
    entries = per_site.values() if isinstance(per_site, Mapping) else ()
    rows = [row for row in entries if isinstance(row, Mapping)]
    return {**evaluation, **{f"own_{key}": _mean(rows, key) for key in ("loss", metric)}}


def _config(text: str) -> dict[str, dict[str, Any]]:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # the page shows the text as it is
        return {}
    return {name: table for name, table in found.items() if isinstance(table, dict)}


def _mean(rows: Iterable[Row], key: str) -> float | None:
    values = [value for row in rows if (value := number(row, key)) is not None]
    return sum(values) / len(values) if values else None
