"""SCAFFOLD in whole runs: what travels, what stays, and that c remains the mean of the c_i."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from models.section import ConfigError
from strategies.flower import RoundError
from tests.fakes import Answer, FakeGrid
from tests.flower_app.nodes import NAMES, Nodes
from tests.flower_app.runs import Killed, Shared, bytes_below, deploy, killed_in, rows, simulate

SCAFFOLD: dict[str, Any] = {
    "train__correction": "scaffold", "train__optimizer": "sgd", "strategy__weighting": "uniform",
    "train__learning_rate": 0.5, "run__rounds": 3,
}  # fmt: skip


def newest(folder: Path) -> dict[str, torch.Tensor]:
    """The newest tensors of a folder of rounds."""
    return load_file(max(folder.glob("round-*.safetensors")))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_server_s_control_variate_is_the_mean_of_the_sites(
    nodes: Nodes, fraction: float
) -> None:
    folder, _ = simulate(nodes, "runs", SCAFFOLD, strategy__fraction=fraction, run__rounds=4)
    assert_mean(folder)


def assert_mean(folder: Path) -> None:
    """The checkpoint's c is the mean of what the sites keep."""
    server_side = newest(folder / "checkpoint")
    states = [newest(folder / "sites" / name) for name in NAMES]
    moved = 0.0
    for name, tensor in server_side.items():
        if name.startswith("payload/control/"):
            own = [state[name.removeprefix("payload/")] for state in states]
            torch.testing.assert_close(tensor, torch.stack(own).mean(0), rtol=1e-4, atol=1e-5)
            moved += float(tensor.abs().sum())
    assert moved > 0


def test_a_round_that_did_not_count_is_none_for_the_site_either(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarantined reply must not leave the site's control variate ahead of the server's."""
    make = nodes.grid

    def spoiling(*configs: Any, **extra: Any) -> FakeGrid:
        grid = make(*configs, **extra)
        honest = grid.sites[2]

        def north(question: Message) -> Iterable[Answer]:
            for answer in honest(question):
                if question.metadata.message_type == "train" and question.metadata.group_id == "2":
                    assert answer.report
                    answer.report["num-examples"] = -1
                yield answer

        grid.sites[2] = north
        return grid

    monkeypatch.setattr(nodes, "grid", spoiling)
    folder, _ = simulate(nodes, "runs", SCAFFOLD, run__rounds=4)
    status = [row["status"] for row in rows(folder, "site") if row["site"] == "north"]
    assert status == ["ok", "quarantined", "ok", "ok"]
    kept = sorted(path.stem for path in (folder / "sites" / "north").glob("round-*"))
    assert kept == ["round-00001", "round-00003", "round-00004"]
    assert_mean(folder)


def test_control_variates_double_the_bytes_and_pass_the_gate(nodes: Nodes, shared: Shared) -> None:
    folder, grid = shared.simulate(SCAFFOLD)
    size = 4 * sum(tensor.numel() for tensor in nodes.start().values())
    for row in rows(folder, "site"):
        assert (row["status"], row["bytes_up"], row["bytes_down"]) == ("ok", 2 * size, 2 * size)
    names = list(grid.questions[-1].content.array_records["arrays"])
    assert names == [*nodes.start(), *(f"control/{name}" for name in nodes.start())]
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == set(nodes.start())


def test_the_first_round_is_fedavg_and_later_ones_are_not(nodes: Nodes, shared: Shared) -> None:
    _, corrected = shared.simulate(SCAFFOLD)
    _, plain = simulate(nodes, "plain", SCAFFOLD, train__correction="none")
    names = list(nodes.start())
    for round_, same in ((1, True), (2, True), (3, False)):  # what they start from, and then end
        one, other = (sent(grid, round_, names) for grid in (corrected, plain))
        assert (one == other) is same, round_


def sent(grid: FakeGrid, round_: int, names: Iterable[str]) -> list[bytes]:
    """Named tensors that the sites were sent to train from in a round."""
    wanted = ("train", str(round_))
    question = next(
        q for q in grid.questions if (q.metadata.message_type, q.metadata.group_id) == wanted
    )
    return [question.content.array_records["arrays"][name].data for name in names]


def test_it_goes_with_personal_parts(nodes: Nodes) -> None:
    folder, grid = simulate(nodes, "runs", SCAFFOLD, payload__personal="lora_B")
    names = list(grid.questions[-1].content.array_records["arrays"])
    assert names and not any(".lora_B." in name for name in names)
    kept = newest(folder / "sites" / "north")
    assert {name.partition("/")[0] for name in kept} == {"control", "personal"}


def test_a_killed_run_ends_with_the_same_bytes(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = deploy(nodes, "whole", SCAFFOLD)
    expected = bytes_below(whole) | bytes_below(nodes.folder / "whole-state" / whole.name)
    make = nodes.grid

    def dying(*configs: Any, **extra: Any) -> FakeGrid:
        grid = make(*configs, **extra)
        killed_in(grid, 3, monkeypatch)
        return grid

    monkeypatch.setattr(nodes, "grid", dying)
    with pytest.raises(Killed):
        deploy(nodes, "cut", SCAFFOLD)
    monkeypatch.setattr(nodes, "grid", make)
    nodes.restart()
    again, _ = deploy(nodes, "cut", SCAFFOLD, run__resume="latest")
    assert bytes_below(again) | bytes_below(nodes.folder / "cut-state" / again.name) == expected


def test_an_absurd_control_variate_is_quarantined(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absurd(own: Any, server_side: Any, delta: Any, travelled: float) -> Any:
        return {name: tensor + float("nan") for name, tensor in own.items()}

    monkeypatch.setattr("strategies.control.renewed", absurd)
    with pytest.raises(RoundError, match=r"not-finite: .*'control/"):
        simulate(nodes, "runs", SCAFFOLD)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train__optimizer": "adamw"}, r"train\.optimizer='sgd' with .*got 'adamw'.*Set it"),
        ({"train__prox_mu": 0.1}, r"train\.prox-mu=0 with .*got 0\.1"),
        ({"strategy__weighting": "examples"}, r"strategy\.weighting='uniform' .*got 'examples'"),
        ({"strategy__server_optimizer": "adam"}, r"server-optimizer='none' .*got 'adam'"),
        ({"strategy__pre": "clip"}, r"strategy\.pre='' .*got 'clip'"),
        ({"strategy__rule": "lora-svd"}, r"one of mean, lora-mean, median.*got 'lora-svd'"),
    ],
)
def test_what_does_not_go_with_scaffold_is_refused(
    nodes: Nodes, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(nodes, "runs", SCAFFOLD | keys)
