"""Whole runs of split learning with parts that are trained in full."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flower_app import generate
from flower_app.split.server import mean_of
from models.section import ConfigError
from models.split.load import Cuts, write_parts
from models.split.rounds import Learnt
from tests.flower_app.nodes import Nodes
from tests.flower_app.runs import Killed, bytes_below, deploy, killed_in, rows, run, simulate
from tests.flower_app.split.test_runs import SPLIT, joined, together


@pytest.fixture
def family() -> str:
    """GPT-2, whose embedding is its output layer too."""
    return "gpt2"


def moved(nodes: Nodes, folder: Path) -> set[str]:
    """Tensors of the model itself that a run's adapter holds, all of which it changed."""
    before = load_file(nodes.model / "model.safetensors")
    after = load_file(folder / "adapter" / "adapter_model.safetensors")
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in after.items()}
    weights = {name: tensor for name, tensor in named.items() if "lora" not in name}
    for name, tensor in weights.items():
        tied = name.replace("lm_head", "transformer.wte")
        assert not torch.equal(tensor, before[tied])
        assert torch.equal(tensor, named[tied])
    return weights.keys()


@pytest.mark.parametrize(
    "parts", [("full", "lora", "lora"), ("none", "full", "full"), ("full", "full", "full")]
)
def test_parts_in_full_join_with_the_others(
    nodes: Nodes, parts: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    head, middle, tail = parts
    keys = SPLIT | {"split__head": head, "split__middle": middle, "split__tail": tail}
    folder, _ = simulate(nodes, "split", keys)
    names = moved(nodes, folder)
    # The embedding is in both ends as the one tensor that it is.
    assert {"transformer.wte.weight", "lm_head.weight"} <= names
    for block, what in zip((0, 1, 2, 3), (head, middle, middle, tail), strict=True):
        assert any(f".h.{block}.mlp" in name for name in names) == (what == "full")
    first, last = rows(folder, "evaluation")[0], rows(folder, "evaluation")[-1]
    assert last["loss"] < first["loss"]
    assert joined(nodes, folder, **keys) == pytest.approx(last["loss"], abs=1e-5)
    capsys.readouterr()
    asked = ["--run", str(folder), "--prompt", "the cat", "--max-new-tokens", "3"]
    assert generate.main([*asked, "--temperature", "0"]) == 0
    assert "the cat" in capsys.readouterr().out


def test_the_middle_in_full_outlives_a_killed_server(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = SPLIT | {"split__middle": "full"}
    reference, _ = simulate(nodes, "reference", keys)
    blocks = {name.split(".")[2] for name in moved(nodes, reference)}
    assert blocks == {"1", "2"}
    keys |= {"run__output_dir": str(nodes.folder / "killed")}
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    killed_in(grid, 2, monkeypatch)
    with pytest.raises(Killed):
        run(nodes, grid, **keys)
    nodes.states.clear()
    again = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    folder = run(nodes, again, **keys, run__resume="latest")
    assert bytes_below(folder) == bytes_below(reference)


def test_replicas_in_full_are_averaged() -> None:
    before = {"h.1.mlp.weight": torch.ones(2, 3)}
    for sites, mean in ((1, 1.5), (2, 1.0)):  # of the first, each of which weighs the same
        learnt = [
            Learnt({"h.1.mlp.weight": torch.full((2, 3), value)}, count)
            for value, count in ((0.0, sites), (3.0, 1))
        ]
        found = mean_of(before, learnt)
        torch.testing.assert_close(found, {"h.1.mlp.weight": torch.full((2, 3), mean)})


def test_replicas_of_a_middle_in_full_serve_a_run(nodes: Nodes) -> None:
    keys: dict[str, Any] = {"split__schedule": "hierarchical", "split__middle": "full"}
    folder = together(nodes, "replicas", **keys)
    assert {name.split(".")[2] for name in moved(nodes, folder)} == {"1", "2"}
    last = rows(folder, "evaluation")[-1]
    assert joined(nodes, folder, **SPLIT, **keys) == pytest.approx(last["loss"], abs=1e-5)


def test_a_server_without_head_and_tail_is_refused(nodes: Nodes) -> None:
    parts = write_parts(nodes.model, nodes.folder / "parts", Cuts())
    nodes.model = parts["site"]
    nodes.keys["model.name"] = str(parts["server"])
    for part in ("head", "tail"):
        with pytest.raises(
            ConfigError, match=r"Expected the whole model in .*whole folder, or set"
        ):
            deploy(nodes, part, SPLIT, **{f"split__{part}": "full"})


@pytest.mark.parametrize("part", ["head", "middle", "tail"])
def test_weights_in_low_precision_are_refused(nodes: Nodes, part: str) -> None:
    keys: dict[str, Any] = {f"split__{part}": "full", "model__dtype": "bfloat16"}
    message = f"Expected model.dtype='float32' with split.{part}='full', got 'bfloat16'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        simulate(nodes, "wrong", SPLIT, **keys)
