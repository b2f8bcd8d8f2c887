"""Matplotlib figures as inline SVG that takes its colours and font from the page."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Every colour is drawn as a marker and replaced by the page's CSS variable of that name, so that
# one drawing serves the light and the dark scheme.
PALETTE = (
    "ink",
    "soft",
    "grid",
    "paper",
    "federated",
    "alone",
    "pooled",
    "before",
    "sites",
    "personal",
)
MARKER = {name: f"#{place:02x}fe{place:02x}" for place, name in enumerate(PALETTE, start=1)}

STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a site name with two dollar signs is no formula
    "font.size": 10.5,
    "text.color": MARKER["ink"],
    "axes.edgecolor": MARKER["grid"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": MARKER["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": MARKER["soft"],
    "ytick.color": MARKER["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}

WIDTH = 330.0  # units of every drawing; about the pixels of a phone, so that text stays legible


def canvas(height: float, *, left: float, right: float, bottom: float = 22) -> tuple[Figure, Axes]:
    """A figure of WIDTH × height units with one pair of axes inside the margins (same units).

    Call it, and draw, within `matplotlib.rc_context(STYLE)`.
    """
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    box = (
        left / WIDTH,
        bottom / height,
        (WIDTH - left - right) / WIDTH,
        (height - bottom - 10) / height,
    )
    return figure, figure.add_axes(box)


def inline(figure: Figure, key: str, title: str, description: str) -> str:
    """The figure as an `<svg>` element for an HTML page; `key` makes its ids unique there."""
    buffer = io.StringIO()
    # A date or a version in the file would make two reports of one run differ.
    plain = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings(), matplotlib.rc_context({**STYLE, "svg.hashsalt": key}):
        # Only widths are measured with matplotlib's font; the browser brings the glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=plain)
    body = buffer.getvalue()
    body = body[body.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    assert view is not None
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{key}-", body)
    body = re.sub(r"font: ([0-9.]+)px [^;\"]+", r"font-size: \1px", body)
    for name, marker in MARKER.items():
        body = body.replace(marker, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    return (
        f'<svg viewBox="{view[1]}" role="img" aria-labelledby="{key}-title {key}-desc">\n'
        f'<title id="{key}-title">{html.escape(title)}</title>\n'
        f'<desc id="{key}-desc">{html.escape(description)}</desc>{body}'
    )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart, in the order of `wanted` and close to it, within low..high.

    Where there is no room for all, they are spaced evenly over low..high.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    if len(order) > 1 and gap * (len(order) - 1) >= high - low:
        step = (high - low) / (len(order) - 1)
        placed = [low + step * rank for rank in range(len(order))]
    else:
        placed = []
        for i in order:  # upwards: each clear of the one below
            placed.append(max(wanted[i], low, placed[-1] + gap if placed else low))
        ceiling = high
        for rank in reversed(range(len(placed))):  # and back down from the top edge
            placed[rank] = min(placed[rank], ceiling)
            ceiling = placed[rank] - gap
    result = [0.0] * len(order)
    for rank, i in enumerate(order):
        result[i] = placed[rank]
    return result
