"""Ditto in whole runs: personal models at the sites, limits of lambda, what is reported."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flower_app import compose
from flower_app.config import parse
from flower_app.recorder import read_score
from flower_app.report import write_report
from models.section import ConfigError
from strategies import registry
from tests.flower_app.nodes import NAMES, Nodes
from tests.flower_app.runs import bytes_below, rows, simulate
from tests.strategies.cohorts import result
from tests.strategies.lora import LORA, lora_cohort, update

PLAIN: dict[str, Any] = {"train__optimizer": "sgd", "train__max_grad_norm": 0.0}


def personal(nodes: Nodes, node: int, round_: int) -> dict[str, Tensor]:
    """Ditto's model of a site, as its state has it."""
    file = nodes.folder / "sites" / NAMES[node] / f"round-{round_:05d}.safetensors"
    return {name.removeprefix("ditto/"): tensor for name, tensor in load_file(file).items()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_small_lambda_is_training_alone(nodes: Nodes) -> None:
    """v follows the site's own training, whatever the server sends in later rounds."""
    keys = {**PLAIN, "train__ditto_lambda": 1e-12}
    start = alone = nodes.start()
    for round_ in (1, 2):
        nodes.train(nodes.simulated(1), round_, start, **keys)
        delta, _ = nodes.train(nodes.simulated(1), round_, alone, **PLAIN)
        alone = {name: tensor + delta[name] for name, tensor in alone.items()}
        assert distance(personal(nodes, 1, round_), alone) < 1e-6
        start = {name: tensor + 0.01 for name, tensor in start.items()}


def test_a_large_lambda_stays_at_the_shared_model(nodes: Nodes) -> None:
    """Where lambda times the learning rate is 1 a step ends a gradient's step from w_global."""
    start, apart = nodes.start(), []
    for rate in (1e-2, 1e-4, 1e-6):
        keys = {**PLAIN, "train__ditto_lambda": 1 / rate, "train__learning_rate": rate}
        nodes.train(nodes.simulated(1), 1, start, **keys)
        apart.append(distance(personal(nodes, 1, 1), start))
        shutil.rmtree(nodes.folder / "sites")  # each is a run of its own
    assert apart[0] > apart[1] > apart[2] and apart[2] < 1e-4


def test_the_shared_model_does_not_notice(nodes: Nodes) -> None:
    plain, _ = simulate(nodes, "plain", run__rounds=2)
    ditto, _ = simulate(nodes, "ditto", run__rounds=2, train__ditto_lambda=0.5)
    assert bytes_below(plain / "adapter") == bytes_below(ditto / "adapter")
    for one, other in zip(rows(plain, "site"), rows(ditto, "site"), strict=True):
        same = ("steps", "tokens", "train_loss", "loss_before", "loss_after", "bytes_up")
        assert [one[key] for key in same] == [other[key] for key in same]


def test_personal_and_shared_quality_of_each_site_are_reported(nodes: Nodes) -> None:
    folder, _ = simulate(nodes, "runs", run__rounds=2, train__ditto_lambda=0.1)
    first, _, last = rows(folder, "evaluation")
    assert first["personal"]["sums"] == first["sums"], "a personal model begins as the shared one"
    assert last["personal"]["per_site"].keys() == set(NAMES)
    assert last["personal"]["sums"] != last["sums"]
    summary = json.loads((folder / "summary.json").read_text())
    for kind, row in {"personal": last["personal"], "federated": last}.items():
        assert summary[kind]["loss"] == pytest.approx(row["loss"])
        losses = [score["loss"] for score in row["per_site"].values()]
        assert summary[kind]["own_loss"] == pytest.approx(sum(losses) / 3)
    page = html.unescape(write_report(folder).read_text())
    assert 'data-row="personal"' in page and "a site's personal model reaches" in page


def test_the_personal_score_is_that_of_the_model_in_the_state(nodes: Nodes) -> None:
    keys, start = {"train__ditto_lambda": 0.1}, nodes.start()
    nodes.train(nodes.simulated(0), 1, start, **keys)
    own = personal(nodes, 0, 1)
    report = nodes.evaluate(nodes.simulated(0), start, 1, **keys)
    plain = nodes.evaluate(nodes.simulated(0), own, 1)
    assert read_score("personal", report) == read_score("before", plain)
    assert read_score("before", report) == read_score("before", nodes.evaluate(
        nodes.simulated(0), start, 1))  # fmt: skip
    saved = load_file(nodes.folder / "sites" / NAMES[0] / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"payload__personal": "lora_B"}, r"whole payload to travel .*got lora_B personal"),
        ({"strategy__rule": "lora-share-a"}, r"got lora_B personal; .*another rule"),
        ({"strategy__rule": "lora-stack"}, r"comparable .*got lora-stack, .* frozen weights"),
        ({"strategy__rule": "lora-svd"}, r"comparable .*got lora-svd, .*'mean' or 'lora-mean'"),
        ({"strategy__rule": "krum"}, r"got krum, .*pre='', or train\.ditto-lambda=0"),
        ({"strategy__pre": "nnm"}, r"got nnm\+mean, which sets them"),
    ],
)
def test_what_does_not_go_with_ditto_is_refused(
    nodes: Nodes, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(nodes, "runs", train__ditto_lambda=1.0, **keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy__rule": "lora-alternate"},
        {"strategy__rule": "lora-freeze-a"},
        {"strategy__rule": "trimmed-mean", "strategy__pre": "clip"},
        {"strategy__rule": "krum", "payload__kind": "ia3"},
    ],
)
def test_rules_that_turn_no_factors_go_with_ditto(nodes: Nodes, keys: dict[str, Any]) -> None:
    compose.check_names(parse(nodes.flat(train__ditto_lambda=1.0, **keys)))


def test_why_rules_that_cut_factors_anew_do_not_go_with_ditto() -> None:
    """The same product from one round to the next, and factors that are far from what they were."""
    cohort = lora_cohort(0, 5)
    still = replace(cohort, rows=[torch.zeros(LORA.size)] * 5)
    delta = result(registry.RULES["lora-svd"](), still)
    assert float(update(still, delta).norm()) < 1e-4 < 0.5 * float(cohort.base_D.norm())
    assert float(delta.norm()) > 0.5 * float(cohort.base_D.norm())


def test_a_site_that_lies_about_its_personal_score_spoils_nothing(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"train__ditto_lambda": 0.1, "run__rounds": 1}
    monkeypatch.setattr(
        "flower_app.siteround.SiteRound.personal_score",
        lambda self, shared, measure: type(shared)(float("nan"), 3, 5, 1),
    )
    folder, _ = simulate(nodes, "runs", **keys)
    assert all("personal" not in row for row in rows(folder, "evaluation"))
    assert json.loads((folder / "summary.json").read_text())["personal"] is None
    assert 'data-row="personal"' not in write_report(folder).read_text()
