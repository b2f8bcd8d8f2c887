"""A heat map as an SVG file: points of accuracy that an attack costs behind a defence."""

from __future__ import annotations

import html
from collections.abc import Sequence

_CELL, _HIGH, _LEFT, _TOP = 46, 24, 190, 110
_WORST = 30.0  # points at which the colour is at its end
_PALE, _DARK, _NONE = (247, 244, 238), (150, 28, 44), "#d9d9d9"


def heatmap(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    points: Sequence[Sequence[float | None]],
) -> str:
    """SVG of losses in points, a row per defence and a column per attack; None is a refusal."""
    width = _LEFT + _CELL * len(columns) + 20
    height = _TOP + _HIGH * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="22" font-size="14">{html.escape(title)}</text>',
    ]
    for at, name in enumerate(columns):
        x, y = _LEFT + _CELL * at + _CELL // 2, _TOP - 8
        parts.append(
            f'<text x="{x}" y="{y}" transform="rotate(-40 {x} {y})">{html.escape(name)}</text>'
        )
    for down, name in enumerate(rows):
        y = _TOP + _HIGH * down
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{html.escape(name)}</text>'
        )
        for at, value in enumerate(points[down]):
            parts.append(_box(_LEFT + _CELL * at, y, value))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(x: int, y: int, value: float | None) -> str:
    share = 0.0 if value is None else min(max(value / _WORST, 0.0), 1.0)
    mixed = (round(p + share * (d - p)) for p, d in zip(_PALE, _DARK, strict=True))
    fill = _NONE if value is None else "#{:02x}{:02x}{:02x}".format(*mixed)
    ink = "white" if share > 0.5 else "black"
    said = "n/a" if value is None else f"{value:.1f}"
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_HIGH - 2}" fill="{fill}"/>'
        f'<text x="{x + _CELL / 2 - 1}" y="{y + 16}" text-anchor="middle" fill="{ink}">{said}'
        "</text>"
    )
