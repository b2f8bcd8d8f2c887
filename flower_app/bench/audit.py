"""Measures what an attacker gets, and writes it into the documentation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from flower_app.bench.inversion import DELTA, STUDIES, Row, Study, measure
from flower_app.bench.output import Progress, put_into

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "split.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an audit; prints its tables and, unless `--quick`, writes them into docs/split.md."""
    parser = argparse.ArgumentParser(prog="audit", description=__doc__)
    parser.add_argument("audit", choices=["inversion"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", choices=list(STUDIES), action="append", help="all by default")
    parser.add_argument("--quick", action="store_true", help="an eighth of the rows, one cut")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    data: Path = options.data.resolve()
    if not data.is_dir():
        print(f"Expected the data sets in {data}, found none; name them with --data.")
        return 2
    torch.set_num_threads(options.threads)
    progress = Progress()
    for name in options.model or STUDIES:
        study = STUDIES[name]
        text = table(study, measure(study, data, quick=options.quick, progress=progress))
        print(f"{name}\n\n{text}\n", flush=True)
        if not options.quick:
            put_into(PAGE, f"inversion-{name}", text)
    return 0


def table(study: Study, rows: Sequence[Row]) -> str:
    """Markdown table of an audit."""
    quality = "accuracy" if study.classes else "loss"
    lines = [
        f"| head blocks | noise multiplier | ε per vector (δ = {DELTA:g}) | nearest embedding | "
        f"trained decoder | {quality} |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
        "",
        f"A guess of the most frequent token is right for {100 * rows[0].chance:.1f} % of them.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
