"""The quickstart, shortened, on the embedded model and data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flower_app.local import environment
from tests.system.runs import ROOT


def test_quickstart_runs_the_embedded_default_and_generates(tmp_path: Path) -> None:
    overrides = [f"run.output-dir={tmp_path}", "run.rounds=1", "train.steps=2"]
    quickstart = subprocess.run(
        [sys.executable, "-m", "flower_app.quickstart", *overrides],
        cwd=ROOT, env=environment(tmp_path / "home"), capture_output=True, text=True, timeout=1200,
        check=False,
    )  # fmt: skip
    assert quickstart.returncode == 0, quickstart.stdout + quickstart.stderr
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert len(summary["sites"]) == 4
    assert summary["local"]["loss"] < summary["zero_shot"]["loss"]
    assert "All data pooled" in quickstart.stdout + quickstart.stderr

    command = [sys.executable, "-m", "flower_app.generate", "--run", str(tmp_path / "latest")]
    text = subprocess.run(
        [*command, "--prompt", "Return a list of", "--max-new-tokens", "12"],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("Return a list of")
    assert len(text.stdout) > len("Return a list of\n")
