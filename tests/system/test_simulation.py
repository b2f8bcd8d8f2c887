"""The real `flwr run` in Flower's simulation."""

from __future__ import annotations

import html
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.system.runs import Value, WholeRun, adapter_bytes, finish, run_app, wait_for


def test_run_leaves_everything_promised(whole_run: WholeRun) -> None:
    run = whole_run.folder / "latest"
    summary = json.loads((run / "summary.json").read_text())
    for key in ("zero_shot", "local", "federated", "central"):
        assert set(summary[key]) >= {"loss", "perplexity"}, key
    assert summary["sites"] == ["fern", "moss", "thyme"]
    assert summary["rounds"] == 3
    assert summary["seed"] == 0
    assert summary["wall_s"] > 0
    assert summary["tokens_per_s"] > 0
    assert summary["bytes_up_per_round"] == summary["bytes_down_per_round"] > 0
    assert summary["federated"]["loss"] < summary["zero_shot"]["loss"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sites = [row for row in rows if row["kind"] == "site"]
    assert len(sites) == 3 * 3
    assert {row["base_reads"] for row in sites} == {1}, "a worker read the base model again"
    assert (run / "report.html").stat().st_size > 10_000
    promised = {
        "adapter",
        "asked.jsonl",
        "checkpoint",
        "config.toml",
        "metrics.jsonl",
        "report.html",
    }
    assert {path.name for path in run.iterdir()} == promised | {"summary.json"}
    assert "mode = " not in (run / "config.toml").read_text()
    assert "federated-learning" in (run / "adapter" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(str(whole_run.config["model.name"]))
    tuned = PeftModel.from_pretrained(base, run / "adapter")
    tokens = torch.tensor([[1, 5, 9]])
    with torch.no_grad(), tuned.disable_adapter():
        before = tuned(tokens).logits
    with torch.no_grad():
        assert not torch.equal(tuned(tokens).logits, before)
    assert "Federated" in whole_run.output
    assert str(run.resolve()) in whole_run.output


def _simulation_pid(home: Path) -> int | None:
    """The process that runs the ServerApp of a simulation under `home`."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if b"flwr-simulation" in command and f"FLWR_HOME={home}".encode() in environment:
            return int(entry.name)
    return None


def _kill_server(home: Path) -> None:
    pid = _simulation_pid(home)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the server's process in /proc")
def test_resume_after_kill_ends_with_the_same_bytes(
    simulation: Path, whole_run: WholeRun, tmp_path: Path
) -> None:
    config = whole_run.config | {"run.output-dir": str(tmp_path)}
    checkpoint = tmp_path / "latest" / "checkpoint" / "checkpoint.json"
    killed = run_app(simulation, config, sites=3)
    wait_for(checkpoint.is_file)
    _kill_server(simulation)  # in the middle of round 2, most likely
    killed.kill()  # it would wait for the SuperLink to miss the server's heartbeats
    assert json.loads(checkpoint.read_text())["round"] < 3
    assert not (tmp_path / "latest" / "adapter").exists()

    output = finish(run_app(simulation, config | {"run.resume": "latest"}, sites=3))
    assert adapter_bytes(tmp_path) == adapter_bytes(whole_run.folder), output
    rows = (tmp_path / "latest" / "metrics.jsonl").read_text().splitlines()
    rounds = [row["round"] for row in map(json.loads, rows) if row["kind"] == "round"]
    assert rounds == [1, 2, 3]


@dataclass(frozen=True)
class FullRun:
    """A whole model, trained by one site of two: the other has nothing to learn from."""

    folder: Path
    output: str

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "summary.json").read_text()))


@pytest.fixture(scope="module")
def full_run(
    simulation: Path, small_run: dict[str, Value], tmp_path_factory: pytest.TempPathFactory
) -> FullRun:
    folder = tmp_path_factory.mktemp("full")
    rows = [{"site": "fern", "text": f"row {i}"} for i in range(20)]
    rows += [{"site": "moss", "text": ""}] * 3
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_run | {
        "run.output-dir": str(folder), "run.rounds": 2, "data.source": str(path),
        "payload.kind": "full", "model.from-scratch": True,
    }  # fmt: skip
    output = finish(run_app(simulation, config, sites=2))
    return FullRun(folder / "latest", output)


def test_a_whole_model_is_trained_from_random_weights(
    full_run: FullRun, small_run: dict[str, Value]
) -> None:
    summary = full_run.summary
    assert summary["federated"]["loss"] < summary["zero_shot"]["loss"], full_run.output
    model = AutoModelForCausalLM.from_pretrained(full_run.folder / "adapter")
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert summary["trainable_parameters"] == trained
    # The weights that `small_run` names were not the start.
    given = AutoModelForCausalLM.from_pretrained(str(small_run["model.name"])).state_dict()
    assert not any(
        torch.allclose(tensor, given[name], atol=1e-2)
        for name, tensor in model.state_dict().items()
        if tensor.dim() > 1
    )


def test_failing_site_is_left_out_with_its_reason(full_run: FullRun) -> None:
    summary = full_run.summary
    assert summary["sites"] == ["fern"], full_run.output
    assert "takes no part" in full_run.output
    left_out = [entry for entry in summary["quarantined"] if entry["status"] == "refused"]
    assert [entry["round"] for entry in left_out] == [0]
    assert "train.max-length" in left_out[0]["reason"]
    page = html.unescape((full_run.folder / "report.html").read_text())
    assert left_out[0]["reason"] in page


def test_bad_configuration_is_refused_before_anything_is_loaded(
    simulation: Path, small_run: dict[str, Value], tmp_path: Path
) -> None:
    config = small_run | {"run.output-dir": str(tmp_path), "payload.rank": 0, "train.steps": 0}
    output = finish(run_app(simulation, config, sites=3))
    assert "Expected payload.rank" in output
    assert not list(tmp_path.iterdir())
