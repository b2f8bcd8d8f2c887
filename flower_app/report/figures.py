"""The plots of a run: curves over rounds, sites side by side, bytes and time per round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

from flower_app.report.numbers import fit, number, size
from flower_app.report.records import Row, Run
from flower_app.report.svg import MARKER, canvas, spread

MOST_SITES = 48  # rows of the plot of sites; beyond, those worst off are drawn
LABEL_GAP = 13.0
DASHES: Mapping[str, tuple[float, tuple[float, ...]]] = {
    "alone": (0, (5, 3)),
    "pooled": (0, (1.2, 2.4)),
}


def curves(run: Run, key: str) -> Figure | None:
    """`key` on held-out rows over the rounds; None if no evaluation has it."""
    mean = _series(run.evaluations, key)
    if not mean:
        return None
    figure, axes = canvas(206, left=34, right=46)
    for site in run.sites:
        points = [
            (float(row["round"]), value)
            for row in run.evaluations
            if (value := number(run.per_site(row).get(site), key)) is not None
        ]
        faint = 0.75 if len(run.sites) <= 12 else 0.35
        axes.plot(*_columns(points), color=MARKER["sites"], linewidth=1, alpha=faint, zorder=2)
    marks = "o" if len(mean) <= 16 else ""
    axes.plot(
        *_columns(mean),
        color=MARKER["federated"],
        linewidth=3,
        marker=marks,
        markersize=6,
        zorder=4,
    )
    own = _series(run.personal, key)
    axes.plot(*_columns(own), color=MARKER["personal"], linewidth=2, zorder=4)
    ends = [("federated", mean[-1][1])] if mean[-1][0] > 0 else []
    if own and own[-1][0] > 0:
        ends.append(("personal", own[-1][1]))
    if mean[-1][0] < (number(run.summary, "rounds") or 0):  # unfinished: the curve ends midway
        ends = []
        _label(axes, "federated", mean[-1][1], (mean[-1][0], mean[-1][1]), "data")
    if mean[0][0] == 0:
        axes.plot([0], [mean[0][1]], "o", color=MARKER["before"], markersize=8, zorder=5)
    for name, row in (("alone", run.summary.get("local")), ("pooled", run.summary.get("central"))):
        value = number(row, key)
        if value is not None:
            axes.axhline(value, color=MARKER[name], linestyle=DASHES[name], linewidth=1.8, zorder=3)
            ends.append((name, value))
    _value_axis(axes)
    _round_axis(axes, run)
    _end_labels(axes, ends)
    return figure


def sites(run: Run, key: str) -> Figure | None:
    """`key` of each site on its own held-out rows, for each kind of model that is known."""
    names = drawn_sites(run, key)
    if not names:
        return None
    kinds = site_values(run, key)
    height = 40 + (24 if len(names) <= 6 else 19 if len(names) <= 16 else 14) * len(names)
    figure, axes = canvas(height, left=112, right=10)
    for place, site in enumerate(names):
        known = [kinds[kind][site] for kind in kinds if site in kinds[kind]]
        axes.plot(
            [min(known), max(known)], [place] * 2, color=MARKER["grid"], linewidth=4, zorder=2
        )
    shapes = {"before": "o", "alone": "D", "pooled": "s", "personal": "^", "federated": "o"}
    for kind, values in kinds.items():
        here = [(place, values[site]) for place, site in enumerate(names) if site in values]
        axes.plot(
            [value for _, value in here],
            [place for place, _ in here],
            shapes[kind],
            color=MARKER[kind],
            markerfacecolor=MARKER["paper"] if kind == "before" else MARKER[kind],
            markersize=9 if kind == "federated" else 7,
            zorder=4 if kind == "federated" else 3,
        )
    axes.set_yticks(range(len(names)), [fit(name, 16) for name in names])
    axes.tick_params(axis="y", labelcolor=MARKER["ink"], pad=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_decimals())
    return figure


def site_values(run: Run, key: str) -> dict[str, dict[str, float]]:
    """Kind (`before`, `alone`, …) → site → `key` on that site's own held-out rows."""
    first = run.evaluations[0] if run.evaluations and run.evaluations[0]["round"] == 0 else None
    last = run.evaluations[-1] if run.evaluations and run.evaluations[-1]["round"] > 0 else None
    own = run.personal[-1] if last and run.personal else None
    tables: dict[str, Callable[[str], float | None]] = {
        "before": lambda site: number(run.per_site(first).get(site), key),
        "alone": lambda site: number(run.local.get(site), f"own_{key}"),
        "pooled": lambda site: number(run.per_site(run.central).get(site), key),
        "personal": lambda site: number(run.per_site(own).get(site), key),
        "federated": lambda site: number(run.per_site(last).get(site), key),
    }
    found = {
        kind: {site: value for site in run.sites if (value := look(site)) is not None}
        for kind, look in tables.items()
    }
    return {kind: values for kind, values in found.items() if values}


def drawn_sites(run: Run, key: str) -> list[str]:
    """Sites with any value, by name; if there are too many to draw, those that are worst off."""
    kinds = site_values(run, key)
    names = [site for site in run.sites if any(site in values for values in kinds.values())]
    if len(names) <= MOST_SITES:
        return names
    latest = list(kinds.values())[-1]
    high_is_bad = -1 if key != "accuracy" else 1
    order = {site: high_is_bad * latest.get(site, -high_is_bad * math.inf) for site in names}
    return sorted(sorted(names, key=lambda site: order[site])[:MOST_SITES])


def traffic(run: Run) -> Figure | None:
    """Bytes to and from all sites per round, side by side."""
    down, up = _series(run.rounds, "bytes_down"), _series(run.rounds, "bytes_up")
    if not down and not up:
        return None
    figure, axes = canvas(172, left=54, right=8)
    for points, shift, kind in ((down, -0.2, "sites"), (up, 0.2, "federated")):
        at, height = _columns(points)
        axes.bar([x + shift for x in at], height, width=0.36, color=MARKER[kind], zorder=3)
    top = max(value for _, value in [*down, *up])
    axes.set_ylim(0, top * 1.08 or 1)
    axes.set_yticks(byte_ticks(top))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value).replace(".0 ", " ")))
    _round_axis(axes, run, first=1)
    return figure


def times(run: Run) -> Figure | None:
    """Seconds of each round: training, waiting and aggregation, stacked."""
    parts = (("train_s", "federated"), ("wait_s", "sites"), ("aggregate_s", "before"))
    rows = [row for row in run.rounds if any(number(row, key) is not None for key, _ in parts)]
    if not rows:
        return None
    figure, axes = canvas(172, left=54, right=8)
    base = [0.0] * len(rows)
    at = [float(row["round"]) for row in rows]
    for key, kind in parts:
        heights = [max(number(row, key) or 0.0, 0.0) for row in rows]
        axes.bar(at, heights, bottom=base, width=0.62, color=MARKER[kind], zorder=3)
        base = [low + more for low, more in zip(base, heights, strict=True)]
    axes.set_ylim(0, max(base) * 1.08 or 1)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    _round_axis(axes, run, first=1)
    return figure


def byte_ticks(top: float) -> list[float]:
    """Zero and up to four round numbers of bytes, KiB, MiB or GiB, the last at most `top`."""
    unit = 1024.0 ** min(max(0, math.floor(math.log(max(top, 1), 1024))), 4)
    steps = [base * 10**power * unit for power in range(-1, 4) for base in (1, 2, 2.5, 5)]
    step = next((step for step in steps if top / step < 5), steps[-1])
    return [step * place for place in range(int(top / step) + 1)]


def _series(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return [(float(row["round"]), value) for row in rows if (value := number(row, key)) is not None]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _value_axis(axes: Axes) -> None:
    """A plain scale, or a logarithmic one where a bad start would flatten everything after it."""
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(_decimals())


def _decimals() -> ScalarFormatter:
    """Tick labels with as many decimals each as the finest needs, and no common factor."""
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    return formatter


def _round_axis(axes: Axes, run: Run, first: int = 0) -> None:
    """Whole rounds, from `first` (0 reads `start`) to the last one planned or seen."""
    seen = [int(row["round"]) for row in (*run.evaluations, *run.rounds)]
    last = max([first + 1, int(number(run.summary, "rounds") or 0), *seen])
    margin = 0.25 if first == 0 else 0.6
    axes.set_xlim(first - margin, last + margin)
    step = max(1, math.ceil(last / 10))
    ticks = [first, *range(step if step > first else first + step, last + 1, step)]
    axes.set_xticks(ticks, ["start" if tick == 0 else str(tick) for tick in ticks])
    axes.tick_params(axis="x", pad=6)


def _end_labels(axes: Axes, ends: Sequence[tuple[str, float]]) -> None:
    """The value of each line at its right end, moved apart where they would overlap."""
    height = float(axes.bbox.height)
    low = float(axes.bbox.y0)
    wanted = [float(axes.transData.transform((0, value))[1]) - low for _, value in ends]
    places = spread(wanted, LABEL_GAP, 0, height)
    for (name, value), place in zip(ends, places, strict=True):
        _label(axes, name, value, (1, place / height), "axes fraction")


def _label(axes: Axes, name: str, value: float, at: tuple[float, float], unit: str) -> None:
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    axes.annotate(
        f"{value:,.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}",
        xy=at,
        xycoords=unit,
        xytext=(7, 0),
        textcoords="offset points",
        color=MARKER[name],
        va="center",
        fontweight="bold" if name == "federated" else "normal",
        annotation_clip=False,
    )
