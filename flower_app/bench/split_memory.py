"""Peak memory of loading a whole model, what a site holds of it, and what the server holds.

Each is loaded and used in a fresh process; what counts is the growth of the peak after the imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flower_app.bench.bases import LARGE, SMALL, save_base
from flower_app.bench.memory import forget_peak, peak_bytes
from flower_app.bench.output import Outcome, Progress, table
from models import base
from models.config import ModelConfig, PayloadConfig
from models.split import base as split
from models.split.config import SplitConfig
from models.split.load import SERVER, SITE, Cuts, write_parts

_TEXTS = ["One sentence is enough to train a tokenizer whose tokens are not used."]


def measure(quick: bool) -> Outcome:
    """The whole and both sides of a model of 130M parameters, 260K with `quick`."""
    shape, say, rows = SMALL if quick else LARGE, Progress(), []
    with tempfile.TemporaryDirectory(prefix="florilegium-bench-") as folder:
        whole = Path(folder) / "whole"
        parameters = save_base(whole, shape, _TEXTS)
        parts = write_parts(whole, Path(folder) / "parts", Cuts())
        asked = {
            "whole model": ("whole", whole),
            "head and tail, of the whole folder": ("site", whole),
            "head and tail, of their own": ("site", parts["site"]),
            "middle, of the whole folder": ("server", whole),
            "middle, of its own": ("server", parts["server"]),
        }
        for what, (side, place) in asked.items():
            say(f"{what} ...")
            command = [sys.executable, "-m", "flower_app.bench.split_memory", side, str(place)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            on_disk = sum(file.stat().st_size for file in place.glob("*.safetensors"))
            rows.append({"what": what, "folder": on_disk, **json.loads(done.stdout)})
    whole_peak = rows[0]["peak"]
    text = table(
        ["loaded", "weights in the folder", "memory at the peak", "of the whole model's"],
        [
            [row["what"], *(f"{row[key] / 2**20:,.0f} MiB" for key in ("folder", "peak")),
             f"{row['peak'] / whole_peak:.2f}"]
            for row in rows
        ],
    )  # fmt: skip
    return Outcome(f"{shape} ({parameters / 1e6:.1f}M parameters), float32\n\n{text}", rows)


def peak_of(side: str, folder: Path) -> int:
    """Bytes by which the peak of this process grows with the loading of one side, or the whole."""
    model = ModelConfig(name=str(folder))
    forget_peak()
    before = peak_bytes()
    modules: list[Any] = []
    if side == "whole":
        modules = [base.load(model).model]
    else:
        wanted = SITE if side == "site" else SERVER
        held = split.load(model, PayloadConfig(kind="split"), SplitConfig(), wanted)
        modules = [held.model, held.middle]
    # Weights are mapped from the file, and come into memory when they are first used.
    for parameter in (p for module in modules for p in module.parameters() if not p.is_meta):
        float(parameter.detach().sum())
    return peak_bytes() - before


if __name__ == "__main__":
    print(json.dumps({"peak": peak_of(sys.argv[1], Path(sys.argv[2]))}))
