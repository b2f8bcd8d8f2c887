"""Cuts a model folder into what a site and what the server of a split run need."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from models.base import find_folder, quiet
from models.section import ConfigError
from models.split.load import Cuts, digest_of_parts, write_parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Cut a model; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="split", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cut = commands.add_parser("cut", help="write the parts of a model into two folders")
    cut.add_argument("model", help="folder in hub format, hub id, or 'embedded'")
    cut.add_argument("--out", type=Path, required=True, help="gets the folders site and server")
    cut.add_argument("--head-blocks", type=int, default=1, help="blocks at the site, at the start")
    cut.add_argument("--tail-blocks", type=int, default=1, help="blocks at the site, at the end")
    cut.add_argument("--task", choices=("causal-lm", "classification"), default="causal-lm")
    cut.set_defaults(act=_cut)
    options = parser.parse_args(arguments)
    try:
        options.act(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _cut(options: argparse.Namespace) -> None:
    quiet()
    cuts = Cuts(options.head_blocks, options.tail_blocks, options.task)
    places = write_parts(find_folder(options.model), options.out, cuts)
    for place, folder in places.items():
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{place:<7} {size / 1e6:9.1f} MB  {folder}")
    print(f"digest of model and cut  {digest_of_parts(places['site'], cuts)}")


if __name__ == "__main__":
    sys.exit(main())
