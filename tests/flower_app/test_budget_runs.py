"""Whole runs of deployed sites under policies: refused before training, charged, stated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flower_app.ledger import main
from models.section import ConfigError
from privacy.accounting import epsilon
from privacy.ledger import Ledger
from tests.flower_app.nodes import NAMES, Nodes
from tests.flower_app.runs import run

KEYS: dict[str, Any] = {
    "data__partition": "own", "strategy__min_sites": 3, "privacy__unit": "record",
    "privacy__noise_multiplier": 4.0,
}  # fmt: skip


def go(nodes: Nodes, name: str, policies: dict[str, str], **more: Any) -> tuple[Path, list[str]]:
    """A run of sites with policies and state folders; its folder and the kinds of its messages."""
    keys = KEYS | {"run__output_dir": str(nodes.folder / "runs")} | more
    configs = []
    for site in NAMES:
        node = nodes.deployed(site, state_path=str(nodes.folder / "state" / site))
        if text := policies.get(site):
            (nodes.folder / f"{name}-{site}.toml").write_text(text, "utf-8")
            node["policy-path"] = str(nodes.folder / f"{name}-{site}.toml")
        configs.append(node)
    grid = nodes.grid(*configs, **keys)
    try:
        folder = run(nodes, grid, **keys)
    finally:
        kinds = [message.metadata.message_type for message in grid.questions]
    return folder, kinds


def ledger(nodes: Nodes, site: str) -> Ledger:
    return Ledger(nodes.folder / "state" / site / "ledger.jsonl")


def test_a_run_beyond_a_sites_budget_is_refused_before_training(nodes: Nodes) -> None:
    with pytest.raises(ConfigError) as refusal:
        go(nodes, "first", {"north": "max-epsilon = 0.5"}, run__rounds=8, run__deadline_s=1.0)
    text = str(refusal.value)
    assert "Expected at least 3 sites (strategy.min-sites), got 2" in text
    found = re.search(
        r"at most epsilon 0\.5 \(max-epsilon; per record, delta 1e-05, zero-out\) by this site's "
        r"policy, got ([\d.]+) with this run: 0 was spent before, 0\.5 remains, and its 8 rounds "
        r"would by themselves spend ([\d.]+)", text,
    )  # fmt: skip
    assert found
    assert float(found[1]) == float(found[2]) > 0.5
    assert not any(ledger(nodes, site).events() for site in NAMES)
    assert not list((nodes.folder / "runs").glob("*/checkpoint/*.safetensors"))


def test_runs_add_up_until_the_budget_is_spent(
    nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = go(nodes, "first", {})
    privacy = json.loads((folder / "summary.json").read_text("utf-8"))["privacy"]
    events = ledger(nodes, "north").events()
    assert [(e.run, e.round, e.count, e.site) for e in events] == [
        (folder.name, 1, 2, "north"), (folder.name, 2, 2, "north"),
    ]  # fmt: skip
    once = ledger(nodes, "north").spent("record", 1e-5)
    assert privacy["sites"]["north"] == pytest.approx(once, rel=1e-6)
    assert once == epsilon(4.0, events[0].sample_rate, 4, 1e-5)
    card = (folder / "adapter" / "README.md").read_text("utf-8")
    assert f"Differential privacy: {privacy['text']}" in card

    twice = epsilon(4.0, events[0].sample_rate, 8, 1e-5)
    budget = f"max-epsilon = {1.01 * twice}"
    again, _ = go(nodes, "second", {"north": budget})
    assert again != folder
    assert ledger(nodes, "north").spent("record", 1e-5) == pytest.approx(twice)
    with pytest.raises(ConfigError, match=r"was spent before, 0\.\d+ remains, and its 2 rounds"):
        go(nodes, "third", {"north": budget}, run__deadline_s=1.0)
    assert len(ledger(nodes, "north").events()) == 4

    policy = str(nodes.folder / "second-north.toml")
    capsys.readouterr()
    assert main(["show", "--ledger", str(ledger(nodes, "north").path), "--policy", policy]) == 0
    assert "remaining  0.0" in capsys.readouterr().out


def test_a_run_goes_on_without_the_site_that_refuses(nodes: Nodes) -> None:
    folder, kinds = go(nodes, "first", {"north": "max-rounds = 1"}, strategy__min_sites=2)
    trained = kinds.count("train")
    assert trained == 2 * 2
    assert not ledger(nodes, "north").events()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    refused = [row for row in rows if row.get("status") == "refused"]
    assert [row["site"] for row in refused] == ["north"]
    assert "at most 1 rounds (run.rounds) by this site's policy, got 2" in refused[0]["reason"]
