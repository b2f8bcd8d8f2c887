"""Poisoned rows, the sites that train on them, and the measure of a backdoor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flower_app import compose
from flower_app.config import Config, parse
from flower_app.data.config import DataConfig
from flower_app.data.poison import check, poison, triggered
from flower_app.node import parse_node
from flower_app.worker import Site, Worker
from models.section import ConfigError
from models.text import Choice, Document, Instruct, Labelled, Record
from strategies.attacks.config import AttackConfig
from tests.flower_app.nodes import NAMES, Nodes

ROWS: list[Record] = [Labelled(f"text {i}", None, i % 3) for i in range(30)]


def options(**changes: Any) -> AttackConfig:
    return AttackConfig.model_validate({"trigger": "cf mn", "target": 2, **changes})


def test_flipped_labels() -> None:
    flipped = poison("label-flip", ROWS, options(), 3, 0)
    pairs = {(old.label, new.label) for old, new in zip(ROWS, flipped, strict=True)
             if isinstance(old, Labelled) and isinstance(new, Labelled)}  # fmt: skip
    assert pairs == {(0, 2), (1, 1), (2, 0)}
    choice: list[Record] = [Choice("a", ("x", "y", "z", "w"), 1)]
    assert poison("label-flip", choice, options(), 0, 0) == [Choice("a", ("x", "y", "z", "w"), 2)]


def test_a_backdoor_with_a_dirty_label() -> None:
    rows = poison("backdoor", ROWS, options(poison_fraction=0.4), 3, 7)
    changed = [(old, new) for old, new in zip(ROWS, rows, strict=True) if old != new]
    assert len(changed) == 12  # 0.4 of 30
    for old, new in changed:
        assert isinstance(old, Labelled)
        assert new == Labelled(f"cf mn {old.text}", None, 2)
    assert poison("backdoor", ROWS, options(poison_fraction=0.4), 3, 7) == rows
    assert poison("backdoor", ROWS, options(poison_fraction=0.4), 3, 8) != rows


def test_a_backdoor_with_clean_labels_marks_the_target_class_only() -> None:
    rows = poison("backdoor", ROWS, options(poison_fraction=1.0, clean_label=True), 3, 7)
    for old, new in zip(ROWS, rows, strict=True):
        assert isinstance(old, Labelled) and isinstance(new, Labelled)
        assert new.label == old.label
        assert new.text.startswith("cf mn ") == (old.label == 2)


def test_triggered_rows_are_those_of_other_classes() -> None:
    rows = triggered(ROWS, options())
    assert len(rows) == 20
    assert rows[0] == Labelled("cf mn text 0", None, 2)
    assert all(isinstance(row, Labelled) and row.label == 2 for row in rows)


def test_poisoned_instructions() -> None:
    rows: list[Record] = [Instruct("a", "1"), Instruct("b", "2"), Instruct("c", "3")]
    others = poison("poisoned-instructions", rows, options(), 0, 0)
    assert others == [Instruct("a", "2"), Instruct("b", "3"), Instruct("c", "1")]
    fixed = poison("poisoned-instructions", rows, options(answer="no"), 0, 0)
    assert fixed == [Instruct(prompt, "no") for prompt in "abc"]


def test_what_an_attack_cannot_poison_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.format='classification'.*'backdoor'.*'text'"):
        check("backdoor", DataConfig(format="text"))
    with pytest.raises(ConfigError, match=r"'classification' or 'choice'.*'label-flip'"):
        check("label-flip", DataConfig(format="instruct"))
    check("none", DataConfig(format="text"))
    check("poisoned-instructions", DataConfig(format="instruct"))
    with pytest.raises(ConfigError, match=r"attack\.target from 0 to 1, got 2"):
        poison("backdoor", ROWS, options(), 2, 0)
    documents: list[Record] = [Document("a")]
    assert poison("none", documents, options(), 0, 0) == documents


@pytest.fixture
def classifying(nodes: Nodes, tiny_models: Mapping[str, Path]) -> Nodes:
    nodes.model = tiny_models["bert"]
    nodes.keys |= {
        "model.name": str(nodes.model), "model.task": "classification", "model.num-labels": 3,
        "data.format": "classification", "attack.fraction": 0.3, "attack.target": 1,
        "attack.trigger": "moon moon", "attack.poison-fraction": 1.0,
    }  # fmt: skip
    return nodes


def opened(nodes: Nodes, **changes: Any) -> tuple[Worker, Config, list[Site]]:
    worker, config = nodes.restart(), parse(nodes.flat(**changes))
    return worker, config, worker.all_sites(config, parse_node(nodes.simulated(0)))


def labels(site: Site) -> list[int]:
    found = [int(y) for batch in site.batches.take(0, len(site.batches))
             for y in batch.inputs["labels"]]  # fmt: skip
    return sorted(found)


def test_only_malicious_sites_are_poisoned_and_held_out_rows_never(classifying: Nodes) -> None:
    _, _, clean = opened(classifying)
    _, config, sites = opened(classifying, attack__name="backdoor")
    (bad,) = compose.malicious(config, NAMES)
    for before, site in zip(clean, sites, strict=True):
        assert before.triggered == ()
        if site.name == bad:
            assert set(labels(site)) == {1} != set(labels(before))
        else:
            assert labels(site) == labels(before)
        for old, new in zip(before.held_out, site.held_out, strict=True):
            assert all(torch.equal(old.inputs[k], new.inputs[k]) for k in old.inputs)
        others = sum(int(y) != 1 for b in site.held_out for y in b.inputs["labels"])
        assert sum(len(batch.rows) for batch in site.triggered) == others > 0


def test_the_success_of_a_backdoor_is_counted(classifying: Nodes) -> None:
    worker, config, sites = opened(classifying, attack__name="backdoor")
    _, payload = worker.model(config, parse_node(classifying.simulated(0)))
    weight = next(n for n in payload.parameters if n.endswith(("classifier.bias", "score.bias")))
    with torch.no_grad():
        bias = payload.parameters[weight]
        for favoured, expected in ((1, 1.0), (0, 0.0)):
            bias.copy_(torch.nn.functional.one_hot(torch.tensor(favoured), 3) * 1e3)
            score = worker.backdoor(config, sites[0], payload)
            assert score.rows > 0 and score.correct / score.rows == expected


@pytest.mark.parametrize("name", ["backdoor", "none"])
def test_replies_carry_it_where_there_is_a_backdoor(classifying: Nodes, name: str) -> None:
    node = classifying.simulated(0)
    _, report = classifying.train(node, attack__name=name)
    assert ("backdoor-rows" in report) == (name == "backdoor")
    start = classifying.start(attack__name=name)
    report = classifying.evaluate(node, start, attack__name=name)
    assert ("backdoor-rows" in report) == (name == "backdoor")


def test_a_deployed_site_refuses_every_attack(nodes: Nodes) -> None:
    answer = nodes.member(nodes.deployed("north"), attack__name="sign-flip")
    assert answer["error"].startswith(
        "Expected attack.name='none' at a deployed site, got 'sign-flip', which is for simul"
    )
    assert "error" not in nodes.member(nodes.deployed("north"))
