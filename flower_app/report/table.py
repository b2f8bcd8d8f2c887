"""The plain-text table that ends a run on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flower_app.report.numbers import count, duration, number, plural, score, size
from privacy.statement import shown

ROWS = (
    ("zero_shot", "Before training"),
    ("local", "Each site alone"),
    ("federated", "Federated"),
    ("personal", "Personal, at each site"),
    ("central", "All data pooled"),
)


def result_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, tuple[float | None, ...]]]:
    """Key, label and (loss, metric, own loss, own metric) of every result the summary has."""
    metric = str(summary["metric"])
    keys = ("loss", metric, "own_loss", f"own_{metric}")
    return [
        (key, label, tuple(number(summary[key], name) for name in keys))
        for key, label in ROWS
        if isinstance(summary.get(key), Mapping)
    ]


def results_table(summary: Mapping[str, Any]) -> str:
    """The results of a run in lines of at most 80 characters, without a newline at the end.

    `summary` is the content of `summary.json`; results and figures it lacks are left out or
    shown as a dash. Raises KeyError if it does not name its metric.
    """
    metric = str(summary["metric"])
    rows = result_rows(summary)
    shown = 4 if any(value is not None for _, _, values in rows for value in values[2:]) else 2
    width = 26 + 13 * shown
    heads = ["loss", metric] * (shown // 2)
    lines = [
        " " * 26 + f"{'all held-out rows':>26}" + f"{'each on its own rows':>26}" * (shown == 4),
        " " * 26 + "".join(f"{head:>13}" for head in heads),
        "─" * width,
    ]
    for _, label, values in rows:
        lines.append(f"{label:<26}" + "".join(f"{score(v):>13}" for v in values[:shown]))
    lines += ["─" * width, *_figures(summary)]
    return "\n".join(line.rstrip() for line in lines)


def privacy(summary: Mapping[str, Any]) -> str:
    """Epsilon with its unit and delta in a few words; empty without differential privacy."""
    told = summary.get("privacy")
    stream = told.get("stream") if isinstance(told, Mapping) else None
    if isinstance(stream, Mapping) and (epsilon := number(stream, "epsilon")) is not None:
        return f"epsilon {shown(epsilon)} per position of the streams; none for records"
    if not isinstance(told, Mapping) or told.get("unit") not in ("record", "client"):
        return ""
    epsilon, delta = number(told, "epsilon"), number(told, "delta")
    if epsilon is None or delta is None:
        return f"no epsilon is known (unit {told['unit']})"
    return f"epsilon {shown(epsilon)} per {told['unit']}, delta {delta:.3g}"


def _figures(summary: Mapping[str, Any]) -> list[str]:
    down = size(number(summary, "bytes_down_per_round"))
    up = size(number(summary, "bytes_up_per_round"))
    speed = number(summary, "tokens_per_s")
    lines = [
        f"{'Per round, all sites':<26}{down} to the sites, {up} back",
        *([f"{'Speed':<26}{count(speed)} tokens/s"] if speed is not None else []),
        f"{'Wall time':<26}{duration(number(summary, 'wall_s'))}",
    ]
    if said := privacy(summary):
        lines.append(f"{'Privacy':<26}{said}")
    refused = summary.get("quarantined")
    if refused:
        lines.append(f"{'Left out':<26}{plural(len(refused), 'reply', 'replies')}")
    return lines
