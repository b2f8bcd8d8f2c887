"""Real Flower processes for the tests: a SuperLink in simulation, started once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from flower_app.local import superlink
from tests.system.runs import NAMES, Value, WholeRun, finish, run_app, site_rows


@pytest.fixture(scope="session")
def pooled_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sites' rows in one file, for a simulation."""
    path = tmp_path_factory.mktemp("rows") / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for name in NAMES for row in site_rows(name)))
    return path


@pytest.fixture(scope="session")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """FLWR_HOME of a SuperLink that simulates."""
    home = tmp_path_factory.mktemp("flower")
    with superlink(home, simulation=True):
        yield home


@pytest.fixture(scope="session")
def small_run(tiny_models: Mapping[str, Path], pooled_rows: Path) -> dict[str, Value]:
    """Run config of a training of seconds over three sites."""
    return {
        "run.rounds": 3,
        "model.name": str(tiny_models["llama"]),
        "data.source": str(pooled_rows),
        "train.steps": 6,
        "train.batch-size": 4,
        "train.max-length": 32,
        "train.threads": 1,
    }


@pytest.fixture(scope="session")
def whole_run(
    simulation: Path, small_run: dict[str, Value], tmp_path_factory: pytest.TempPathFactory
) -> WholeRun:
    """A run that nothing disturbed; others must end with the same bytes."""
    folder = tmp_path_factory.mktemp("whole")
    config = small_run | {
        "strategy.server-optimizer": "adam", "strategy.server-learning-rate": 0.01,
    }  # fmt: skip
    here = {"run.output-dir": str(folder), "run.baselines": True}
    output = finish(run_app(simulation, config | here, sites=3))
    assert (folder / "latest" / "summary.json").is_file(), output
    return WholeRun(config, folder, output)
