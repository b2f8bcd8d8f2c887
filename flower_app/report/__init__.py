"""What a run leaves to read: one HTML page in its folder, and a table on the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from flower_app.report.records import ReportError, Run, read_run
from flower_app.report.table import results_table

__all__ = ["ReportError", "Run", "read_run", "results_table", "write_report"]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    Reads what is there of `metrics.jsonl`, `summary.json` and `config.toml`; the same files give
    the same bytes. An older page is replaced at once, never half. Raises ReportError for a folder
    that is not a run's.
    """
    from flower_app.report.page import render  # matplotlib is loaded only when a page is written

    run = read_run(folder)
    target = folder / "report.html"
    draft = folder / f".report.html.{os.getpid()}"
    try:
        draft.write_text(render(run), encoding="utf-8", errors="replace")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target
