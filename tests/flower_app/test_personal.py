"""Personal parts of a payload, in whole runs: what travels, what stays, and what resuming finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models.section import ConfigError
from strategies.flower import RoundError
from tests.fakes import FakeGrid
from tests.flower_app.nodes import NAMES, Nodes
from tests.flower_app.runs import Killed, Shared, bytes_below, deploy, killed_in, rows, simulate

PERSONAL: dict[str, Any] = {"payload__personal": "lora_B", "run__rounds": 3}


def test_personal_parts_never_travel(nodes: Nodes, shared: Shared) -> None:
    folder, grid = shared.simulate(PERSONAL)
    sent = [dict(q.content.array_records) for q in grid.questions]
    travelling = [name for records in sent if records for name in records["arrays"]]
    assert travelling and all(".lora_A." in name for name in travelling)
    shared = sum(tensor.numel() for n, tensor in nodes.start().items() if ".lora_A." in n)
    for row in rows(folder, "site"):
        assert row["bytes_down"] == row["bytes_up"] == 4 * shared
    # A reply of another shape is quarantined, so the sites' replies are of the shared part too.
    assert [row["status"] for row in rows(folder, "site")] == ["ok"] * 9


def test_each_site_keeps_a_part_of_its_own(nodes: Nodes, shared: Shared) -> None:
    folder, _ = shared.simulate(PERSONAL)
    start = {f"personal/{name}" for name in nodes.start() if ".lora_B." in name}
    last = [load_file(folder / "sites" / name / "round-00003.safetensors") for name in NAMES]
    for tensors in last:
        assert tensors.keys() == start
    name = min(start)
    assert len({tensors[name].numpy().tobytes() for tensors in last}) == 3
    assert "of `lora_B` it holds the start values" in (folder / "adapter/README.md").read_text()
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    for key, tensor in saved.items():
        assert bool(tensor.any()) == (".lora_A." in key), "at the server B stays as it began"


def test_a_site_s_adapter_scores_what_the_run_reports(nodes: Nodes) -> None:
    folder, grid = simulate(nodes, "runs", PERSONAL)
    (final,) = [row for row in rows(folder, "evaluation") if row["round"] == 3]
    arrays = grid.questions[-1].content.array_records["arrays"]
    shared = {name: torch.frombuffer(bytearray(a.data), dtype=torch.float32).view(a.shape)
              for name, a in arrays.items()}  # fmt: skip
    for at, site in enumerate(NAMES):
        plan = {"state": str(folder / "sites")}
        report = nodes.evaluate(nodes.simulated(at), shared, 3, plan, **PERSONAL)
        assert report["before-loss-sum"] == final["sums"][site][0]
        base = AutoModelForCausalLM.from_pretrained(nodes.model)
        own = PeftModel.from_pretrained(base, folder / "sites" / site / "adapter")
        kept = load_file(folder / "sites" / site / "round-00003.safetensors")
        plain = {n.replace(".default", ""): p for n, p in own.named_parameters() if "lora_" in n}
        assert all(torch.equal(plain[name], tensor) for name, tensor in shared.items())
        assert all(torch.equal(plain[n.removeprefix("personal/")], t) for n, t in kept.items())


@pytest.mark.parametrize("start", [simulate, deploy], ids=["simulation", "deployment"])
def test_a_killed_run_ends_with_the_same_bytes(
    nodes: Nodes, shared: Shared, start: Callable[..., tuple[Path, FakeGrid]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, _ = (shared.simulate if start is simulate else shared.deploy)(PERSONAL)
    expected = bytes_below(whole) | bytes_below(shared.state(whole) / whole.name)
    make = nodes.grid

    def dying(*configs: Mapping[str, Any], **extra: Any) -> FakeGrid:
        grid = make(*configs, **extra)
        killed_in(grid, 3, monkeypatch)
        return grid

    monkeypatch.setattr(nodes, "grid", dying)
    with pytest.raises(Killed):
        start(nodes, "cut", PERSONAL)
    cut = (nodes.folder / "cut" / "latest").resolve()
    kept = [*cut.rglob("round-00003.*"), *(nodes.folder / "cut-state").rglob("round-00003.*")]
    assert len(kept) == 3, "the sites had gone on to round 3"
    monkeypatch.setattr(nodes, "grid", make)
    moved = cut.rename(cut.with_name("renamed"))
    nodes.restart()
    again, _ = start(nodes, "cut", PERSONAL, run__resume=str(moved))
    found = bytes_below(again) | bytes_below(nodes.folder / "cut-state" / cut.name)
    assert found == expected


def test_sharing_a_is_keeping_b(nodes: Nodes) -> None:
    """FedSA-LoRA is the mean on what travels, with B personal."""
    by_name, _ = simulate(nodes, "one", PERSONAL, run__rounds=2)
    keys = {"payload__personal": "", "strategy__rule": "lora-share-a", "run__rounds": 2}
    by_rule, _ = simulate(nodes, "two", PERSONAL, **keys)
    assert bytes_below(by_name) == bytes_below(by_rule)
    member = nodes.member(nodes.deployed("north"), **keys)
    assert "since strategy.rule='lora-share-a' keeps" in member["error"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"strategy__rule": "lora-share-a", "payload__kind": "soft-prompt"},
            r"payload\.kind='lora' with strategy\.rule='lora-share-a', got 'soft-prompt'",
        ),
        (
            {"strategy__rule": "lora-svd", "payload__personal": "q_proj.lora_B"},
            r"whole pairs .*strategy\.rule='lora-svd', got payload\.personal='q_proj\.lora_B'",
        ),
        ({"payload__personal": "lora_C"}, r"Unknown payload\.personal entry 'lora_C'"),
        ({"payload__personal": "lora_A, lora_B"}, r"leave something that travels"),
    ],
)
def test_what_cannot_stay_is_refused(nodes: Nodes, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(nodes, "runs", PERSONAL, **keys)


@pytest.mark.usefixtures("one_thread")
def test_a_deployed_site_hears_of_no_folder_of_the_server(shared: Shared) -> None:
    folder, grid = shared.deploy(PERSONAL)
    assert not (folder / "sites").exists()
    for question in grid.questions:
        if question.metadata.message_type != "query":
            plan = dict(question.content.config_records["plan"])
            assert plan.keys() == {"round", "layout", "run", "counted"}
            assert plan["run"] == folder.name
    kept = shared.state(folder) / folder.name
    assert sorted(site.name for site in kept.iterdir()) == sorted(NAMES)


def test_a_deployed_site_must_say_where_it_may_keep_things(nodes: Nodes) -> None:
    member = nodes.member(nodes.deployed("north"), **PERSONAL)
    assert "'state-path' in this node's config, since payload.personal" in member["error"]
    assert "error" not in nodes.member(nodes.deployed("north"))
    assert "error" not in nodes.member(nodes.simulated(1), **PERSONAL)


def test_a_site_that_comes_late_begins_with_what_it_is_sent(nodes: Nodes) -> None:
    start = {name: t for name, t in nodes.start().items() if ".lora_A." in name}
    late, _ = nodes.train(nodes.simulated(1), 5, start, **PERSONAL)
    nodes.train(nodes.simulated(1), 6, start, **PERSONAL)
    # Asked for its first round once more, it begins where it began.
    again, _ = nodes.train(nodes.simulated(1), 5, start, **PERSONAL)
    assert all(torch.equal(late[name], tensor) for name, tensor in again.items())
    nodes.restart()
    elsewhere = {"state": str(nodes.folder / "other")}
    fresh, _ = nodes.train(nodes.simulated(1), 5, start, elsewhere, **PERSONAL)
    assert all(torch.equal(late[name], tensor) for name, tensor in fresh.items())


def test_sites_in_one_process_do_not_mix(nodes: Nodes) -> None:
    start = {name: t for name, t in nodes.start().items() if ".lora_A." in name}
    alone = [nodes.train(nodes.simulated(1), r, start, **PERSONAL)[0] for r in (1, 2)]
    plan = {"state": str(nodes.folder / "together")}
    for round_ in (1, 2):
        nodes.train(nodes.simulated(0), round_, start, plan, **PERSONAL)
        found, _ = nodes.train(nodes.simulated(1), round_, start, plan, **PERSONAL)
        assert all(torch.equal(alone[round_ - 1][n], tensor) for n, tensor in found.items())


def test_a_damaged_state_fails_the_site_and_not_the_run(nodes: Nodes) -> None:
    keys = {"strategy__min_sites": 1, "run__quorum": 0.6}
    folder, _ = simulate(nodes, "runs", PERSONAL, **keys, run__rounds=1)
    (folder / "sites" / "north" / "round-00001.safetensors").write_bytes(b"not a tensor")
    simulate(nodes, "runs", PERSONAL, **keys, run__rounds=2, run__resume=str(folder))
    second = {row["site"]: row for row in rows(folder, "site") if row["round"] == 2}
    assert [second[name]["status"] for name in NAMES] == ["ok", "failed", "ok"]
    assert "Expected a whole file of the site's state" in second["north"]["reason"]


def test_a_full_disk_at_every_site_ends_the_run_with_rounds_safe(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = simulate(nodes, "runs", PERSONAL, run__rounds=1)
    before = bytes_below(folder / "sites")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flower_app.sitestate.save_file", full)
    with pytest.raises(RoundError, match=r"write the site's state.*No space.*rounds are safe"):
        simulate(nodes, "runs", PERSONAL, run__rounds=2, run__resume=str(folder))
    assert bytes_below(folder / "sites") == before
