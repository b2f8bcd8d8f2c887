"""The real `flwr run` in Flower's simulation."""

from __future__ import annotations

import html
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.system.runs import Value, adapter_bytes, finish, run_app, wait_for


def test_run_leaves_everything_promised(
    simulation: Path, small_run: dict[str, Value], tmp_path: Path
) -> None:
    config = small_run | {"run.output-dir": str(tmp_path), "run.baselines": True}
    output = finish(run_app(simulation, config, sites=3))
    run = tmp_path / "latest"
    assert (run / "summary.json").is_file(), output
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
    promised = {"adapter", "checkpoint", "config.toml", "metrics.jsonl", "report.html"}
    assert {path.name for path in run.iterdir()} == promised | {"summary.json"}
    assert "mode = " not in (run / "config.toml").read_text()
    assert "federated-learning" in (run / "adapter" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(str(small_run["model.name"]))
    tuned = PeftModel.from_pretrained(base, run / "adapter")
    tokens = torch.tensor([[1, 5, 9]])
    with torch.no_grad(), tuned.disable_adapter():
        before = tuned(tokens).logits
    with torch.no_grad():
        assert not torch.equal(tuned(tokens).logits, before)
    assert "Federated" in output
    assert str(run.resolve()) in output


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
    simulation: Path, small_run: dict[str, Value], tmp_path: Path
) -> None:
    config = small_run | {"run.rounds": 4, "strategy.server-optimizer": "adam"}
    config |= {"strategy.server-learning-rate": 0.01, "train.steps": 6}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = finish(run_app(simulation, config | {"run.output-dir": str(whole)}, sites=3))
    expected = adapter_bytes(whole)
    assert "adapter_model.safetensors" in expected, output

    checkpoint = killed / "latest" / "checkpoint" / "checkpoint.json"

    def done(round_: int) -> bool:
        return checkpoint.is_file() and json.loads(checkpoint.read_text())["round"] >= round_

    first = run_app(simulation, config | {"run.output-dir": str(killed)}, sites=3)
    wait_for(lambda: done(1))
    _kill_server(simulation)  # in the middle of round 2, most likely
    first.kill()  # it would wait for the SuperLink to miss the server's heartbeats
    assert not (killed / "latest" / "adapter").exists()

    resumed = config | {"run.output-dir": str(killed), "run.resume": "latest"}
    second = run_app(simulation, resumed, sites=3)
    wait_for(lambda: done(3))
    _kill_server(simulation)
    second.kill()

    output = finish(run_app(simulation, resumed, sites=3))
    assert adapter_bytes(killed) == expected, output
    rows = (killed / "latest" / "metrics.jsonl").read_text().splitlines()
    rounds = [row["round"] for row in map(json.loads, rows) if row["kind"] == "round"]
    assert rounds == [1, 2, 3, 4]


def test_a_whole_model_is_trained_from_random_weights(
    simulation: Path, small_run: dict[str, Value], tmp_path: Path
) -> None:
    config = small_run | {
        "run.output-dir": str(tmp_path), "run.rounds": 2, "payload.kind": "full",
        "model.from-scratch": True,
    }  # fmt: skip
    output = finish(run_app(simulation, config, sites=3))
    assert (tmp_path / "latest" / "summary.json").is_file(), output
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert summary["federated"]["loss"] < summary["zero_shot"]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "latest" / "adapter")
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert summary["trainable_parameters"] == trained
    # The weights that `small_run` names were not the start.
    given = AutoModelForCausalLM.from_pretrained(str(small_run["model.name"])).state_dict()
    assert not any(
        torch.allclose(tensor, given[name], atol=1e-2)
        for name, tensor in model.state_dict().items()
        if tensor.dim() > 1
    )


def test_bad_configuration_is_refused_before_anything_is_loaded(
    simulation: Path, small_run: dict[str, Value], tmp_path: Path
) -> None:
    config = small_run | {"run.output-dir": str(tmp_path), "payload.rank": 0, "train.steps": 0}
    output = finish(run_app(simulation, config, sites=3))
    assert "Expected payload.rank" in output
    assert not list(tmp_path.iterdir())


def test_failing_site_is_left_out_with_its_reason(
    simulation: Path, small_run: dict[str, Value], tmp_path: Path
) -> None:
    rows = [{"site": "fern", "text": f"row {i}"} for i in range(20)]
    rows += [{"site": "moss", "text": ""}] * 3  # nothing to learn there
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_run | {"data.source": str(path), "run.rounds": 1}
    output = finish(run_app(simulation, config | {"run.output-dir": str(tmp_path)}, sites=2))
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert summary["sites"] == ["fern"], output
    assert "takes no part" in output
    left_out = [entry for entry in summary["quarantined"] if entry["status"] == "refused"]
    assert [entry["round"] for entry in left_out] == [0]
    assert "train.max-length" in left_out[0]["reason"]
    assert left_out[0]["reason"] in html.unescape((tmp_path / "latest" / "report.html").read_text())


def test_a_secure_run_in_flower_s_own_form(
    simulation: Path, small_run: dict[str, Value], tmp_path: Path
) -> None:
    config = small_run | {"run.output-dir": str(tmp_path), "secure.aggregation": "masks"}
    output = finish(run_app(simulation, config | {"run.rounds": 2}, sites=3))
    run = tmp_path / "latest"
    assert (run / "summary.json").is_file(), output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["federated"]["loss"] < summary["zero_shot"]["loss"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows if row["kind"] == "site"] == ["ok"] * 6
    assert not [path for path in (run / "sites").rglob("*") if path.is_file()]
