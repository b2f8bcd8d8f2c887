"""Whole runs of a simulation or of deployed sites in one process, stopped and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

import pytest
from flwr.app import Message

from flower_app import run as server
from flower_app.config import parse
from tests.fakes import FakeGrid, at_the_server
from tests.flower_app.nodes import NAMES, Nodes


class Killed(BaseException):
    """The server's process ends."""


def run(nodes: Nodes, grid: FakeGrid, **keys: Any) -> Path:
    """A whole run; returns its folder."""
    with at_the_server():
        return server.run(grid, parse(nodes.flat(**keys))).path


def simulate(
    nodes: Nodes, name: str, settings: Mapping[str, Any] | None = None, **more: Any
) -> tuple[Path, FakeGrid]:
    """A simulation of three sites; its folder, and the grid with all that was asked."""
    keys = {"run__output_dir": str(nodes.folder / name)} | dict(settings or {}) | more
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    return run(nodes, grid, **keys), grid


def deploy(
    nodes: Nodes, name: str, settings: Mapping[str, Any] | None = None, **more: Any
) -> tuple[Path, FakeGrid]:
    """The same between three deployed sites, with state in `<name>-state`."""
    keys = {"run__output_dir": str(nodes.folder / name)} | dict(settings or {}) | more
    keys |= {"data__partition": "own", "strategy__min_sites": 3}
    if keys.get("payload__kind") == "split":
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        keys = {"split__listen": address, "split__address": address} | keys
    state = str(nodes.folder / f"{name}-state")
    configs = [nodes.deployed(site, state_path=state) for site in NAMES]
    grid = nodes.grid(*configs, **keys)
    return run(nodes, grid, **keys), grid


@dataclass
class Shared:
    """Whole runs that several tests of a file look at, each held once: leave them as they are."""

    nodes: Nodes
    _held: dict[str, tuple[Path, FakeGrid]] = field(default_factory=dict)

    def simulate(
        self, settings: Mapping[str, Any] | None = None, **more: Any
    ) -> tuple[Path, FakeGrid]:
        """The simulation with these keys."""
        return self._once(simulate, dict(settings or {}) | more)

    def deploy(
        self, settings: Mapping[str, Any] | None = None, **more: Any
    ) -> tuple[Path, FakeGrid]:
        """The run between deployed sites with these keys."""
        return self._once(deploy, dict(settings or {}) | more)

    def state(self, run: Path) -> Path:
        """What the deployed sites of a run keep."""
        return self.nodes.folder / f"{run.parent.name}-state"

    def _once(
        self, start: Callable[..., tuple[Path, FakeGrid]], keys: Mapping[str, Any]
    ) -> tuple[Path, FakeGrid]:
        known = f"{start.__name__} {sorted(keys.items())}"
        if known not in self._held:
            self._held[known] = start(self.nodes, f"run-{len(self._held)}", keys)
        return self._held[known]


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Every tensor file and adapter below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of one kind in a run's metrics."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def killed_in(grid: FakeGrid, round_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server die once every site has trained, and kept its state, in a round."""
    pull = grid.pull_messages

    def pulling(message_ids: Iterable[str]) -> Iterable[Message]:
        last = grid.questions[-1].metadata
        if (last.message_type, last.group_id) == ("train", str(round_)):
            raise Killed
        return pull(message_ids)

    monkeypatch.setattr(grid, "pull_messages", pulling)
