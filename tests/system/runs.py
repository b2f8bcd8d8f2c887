"""Starting, watching and reading real runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flower_app.local import environment, flwr_run

Value = bool | int | float | str
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("fern", "moss", "thyme")


@dataclass(frozen=True)
class WholeRun:
    """The config of a finished run but for its output folder, that folder, and what it said."""

    config: dict[str, Value]
    folder: Path
    output: str


def site_rows(name: str, count: int = 24) -> list[dict[str, str]]:
    """Rows of a site, each with a word of its own."""
    words = {"fern": "green frond in the shade", "moss": "soft carpet on the old stone",
             "thyme": "small leaf with a strong scent"}  # fmt: skip
    texts = (f"{name} {number}: a {words[name]}, number {number}" for number in range(count))
    return [{"site": name, "text": text} for text in texts]


def run_app(home: Path, config: Mapping[str, Value], *, sites: int = 0) -> subprocess.Popen[str]:
    """Start `flwr run` with its log streamed; the caller waits for it or kills it."""
    federation = {"num-supernodes": sites, "client-resources-num-cpus": 1} if sites else None
    command = flwr_run(home, ROOT, config, federation=federation)
    return subprocess.Popen(
        command, env=environment(home), text=True, cwd=home,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 900) -> str:
    """Wait for a run and give its output."""
    output, _ = process.communicate(timeout=timeout)
    return output


def wait_for(what: Callable[[], bool], timeout: float = 600) -> None:
    """Poll until `what` holds; fails the test when it does not in time."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "timed out waiting"
        time.sleep(0.05)


def adapter_bytes(output_dir: Path) -> dict[str, bytes]:
    """Contents of the adapter folder of the latest run, by file name."""
    folder = output_dir / "latest" / "adapter"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
