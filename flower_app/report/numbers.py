"""Numbers and foreign words as a person reads them; a missing number is a dash."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

MISSING = "–"


def number(row: Mapping[str, Any] | None, key: str) -> float | None:
    """The finite number under `key`, or None if it is absent, null, NaN, infinite or no number."""
    value = None if row is None else row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int beyond the range of floats
        return None


def score(value: float | None) -> str:
    """A loss, perplexity or accuracy: three decimals, fewer where the number is large."""
    if value is None:
        return MISSING
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.1f}"


def share(value: float | None) -> str:
    """A part of a whole in percent."""
    return MISSING if value is None else f"{100 * value:.3g} %"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return MISSING if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """A number of bytes in binary units (1 MiB = 1024 KiB = 1,048,576 bytes)."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        digits = 0 if unit == "B" or value >= 99.95 else 1
        if value < 1023.5:
            return f"{value:.{digits}f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def duration(seconds: float | None) -> str:
    """A time span in the two units that matter."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(amount: float, one: str, many: str = "") -> str:
    """`1 site`, `4 sites`; `many` where an s does not do."""
    return f"{count(amount)} {one if amount == 1 else many or one + 's'}"


def clean(value: object, limit: int = 300) -> str:
    """Text from elsewhere on one line: no control, direction or broken characters, cut at `limit`.

    Direction marks go because they let one site's name change how its neighbours read.
    """
    marks = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    spaced = " ".join(str(value)[: 4 * limit].split())
    text = "".join("\ufffd" if unicodedata.category(c) in marks else c for c in spaced)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def safe(value: object, limit: int = 300) -> str:
    """`clean`, then escaped for HTML text and attributes."""
    return html.escape(clean(value, limit))


def fit(name: object, width: int) -> str:
    """`clean`, cut to `width` columns, where East Asian wide characters take two."""
    kept, used = "", 0
    text = clean(name)
    for place, char in enumerate(text):
        used += 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if used > width - (place + 1 < len(text)):
            return kept + "…"
        kept += char
    return kept
