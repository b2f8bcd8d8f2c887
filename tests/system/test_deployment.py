"""A real SuperLink with three SuperNodes, against the simulation of the same federation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from flower_app.local import superlink, supernodes
from tests.serverpaths import unnamed
from tests.system.runs import NAMES, Value, adapter_bytes, finish, run_app, site_rows


def test_deployed_sites_train_the_same_bytes_as_simulated_ones(
    simulation: Path, small_run: dict[str, Value], tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    config = small_run | {"run.rounds": 2}
    simulated, deployed = tmp_path / "simulated", tmp_path / "deployed"
    output = finish(run_app(simulation, config | {"run.output-dir": str(simulated)}, sites=3))
    assert (simulated / "latest" / "summary.json").is_file(), output

    nodes = []
    for name in NAMES:
        rows, model = tmp_path / f"{name}.jsonl", tmp_path / f"model-{name}"
        rows.write_text("".join(json.dumps(row) + "\n" for row in site_rows(name)))
        shutil.copytree(tiny_models["llama"], model)
        nodes.append({"site": name, "data-path": str(rows), "model-path": str(model)})
    own = {"data.source": "embedded", "data.partition": "own", "strategy.min-sites": 3}
    unknown_there = unnamed(config | own | {"run.output-dir": str(deployed)})
    home = tmp_path / "flower"
    with superlink(home, simulation=False) as port, supernodes(home, port, nodes):
        output = finish(run_app(home, unknown_there))
    summary = json.loads((deployed / "latest" / "summary.json").read_text())
    assert summary["mode"] == "deployment", output
    assert summary["sites"] == sorted(NAMES)

    # The model cards differ in nothing either: they name no path of either server.
    assert adapter_bytes(deployed) == adapter_bytes(simulated)
    for name in NAMES:
        assert str(tmp_path / f"{name}.jsonl") not in output
