"""Record-level privacy through the whole app: what trains with noise, and what leaves a site."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flower_app import compose
from flower_app.config import parse
from flower_app.recorder import read_score
from flower_app.releases import metrics_noise, planned
from models.section import ConfigError
from privacy.accounting import spent
from privacy.ledger import Ledger
from tests.flower_app.nodes import Nodes, raw
from tests.flower_app.runs import (
    Killed,
    Shared,
    bytes_below,
    deploy,
    killed_in,
    rows,
    run,
    simulate,
)

DP: dict[str, Any] = {"privacy__unit": "record", "privacy__noise_multiplier": 1.0}
SEEDED = DP | {"privacy__noise_source": "seeded"}
# Every record in every step: its epsilon, which a run's summary states, takes no time.
FAST = SEEDED | {"train__batch_size": 16}
SECRET = {"train_loss", "tokens", "useful_tokens"}


def ledgers(folder: Path) -> list[Ledger]:
    return [Ledger(path) for path in sorted((folder / "sites").glob("*/ledger.jsonl"))]


def test_a_simulation_trains_with_noise_and_accounts_for_every_step(
    nodes: Nodes, shared: Shared
) -> None:
    folder, _ = shared.simulate(SEEDED, privacy__metrics="exact")
    summary = json.loads((folder / "summary.json").read_text())
    assert math.isfinite(summary["federated"]["loss"])
    assert all(row["status"] == "ok" for row in rows(folder, "site"))
    plain, _ = simulate(nodes, "plain")
    assert bytes_below(folder / "adapter") != bytes_below(plain / "adapter")
    for ledger, row in zip(ledgers(folder), rows(folder, "site"), strict=False):
        events = ledger.events()
        assert [(e.round, e.count, e.part) for e in events] == [
            (1, 2, "training"),
            (2, 2, "training"),
        ]
        assert {e.sample_rate for e in events} == {min(1.0, 4 / row["examples"])}
        assert {e.noise_multiplier for e in events} == {1.0}
    assert len(ledgers(folder)) == 3


def test_same_seed_same_bytes_but_never_with_the_secure_source(
    nodes: Nodes, shared: Shared
) -> None:
    again, _ = simulate(nodes, "again", FAST)
    assert bytes_below(again / "adapter") == bytes_below(shared.simulate(FAST)[0] / "adapter")
    secure = FAST | {"privacy__noise_source": "secure", "run__rounds": 1}
    found = [bytes_below(simulate(nodes, f"r{at}", secure)[0] / "adapter") for at in range(2)]
    assert found[0] != found[1]


def test_a_run_that_was_killed_ends_with_the_same_bytes(
    nodes: Nodes, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = shared.simulate(FAST)
    keys = FAST | {"run__output_dir": str(nodes.folder / "stopped")}
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    killed_in(grid, 2, monkeypatch)
    with pytest.raises(Killed):
        run(nodes, grid, **keys)
    nodes.restart()
    keys |= {"run__resume": "latest"}
    resumed = run(nodes, nodes.grid(*map(nodes.simulated, range(3)), **keys), **keys)
    assert bytes_below(resumed / "adapter") == bytes_below(whole / "adapter")
    for ledger in ledgers(resumed):  # the round that did not count was trained, and is counted
        assert [event.round for event in ledger.events()] == [1, 2, 2]
        told = json.loads((resumed / "summary.json").read_text())["privacy"]["sites"]
        assert told[ledger.path.parent.name] == pytest.approx(spent(ledger.events(), 1e-5))


def test_deployed_sites_train_in_private(nodes: Nodes) -> None:
    folder, _ = deploy(nodes, "deployed", DP)
    assert [row["status"] for row in rows(folder, "site")] == ["ok"] * 6
    events = Ledger(nodes.folder / "deployed-state" / "ledger.jsonl").events()
    assert sorted({event.site for event in events}) == ["east", "north", "west"]
    assert len(events) == 6


def test_nothing_leaves_beside_the_update_and_public_figures(nodes: Nodes) -> None:
    delta, report = nodes.train(nodes.simulated(0), **SEEDED)
    again, _ = nodes.train(nodes.simulated(0), **SEEDED)
    assert raw(delta) == raw(again)
    assert not SECRET & set(report)
    assert read_score("before", report) == read_score("after", report) == read_score("none", {})
    public = {
        "round", "layout", "num-examples", "examples", "steps", "load_s", "train_s", "eval_s",
        "base_reads", "worker",
    }  # fmt: skip
    told = {name for name in report if not name.startswith(("before-", "after-"))}
    assert told == public
    assert (
        read_score("before", nodes.evaluate(nodes.simulated(0), nodes.start(), **SEEDED)).rows == 0
    )


def page(folder: Path) -> str:
    return " ".join((folder / "report.html").read_text().split())


@pytest.mark.usefixtures("reports")
def test_the_report_says_what_stayed_and_what_had_noise(nodes: Nodes) -> None:
    folder, _ = simulate(nodes, "withheld", FAST, run__rounds=1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["federated"] is None and summary["tokens_per_s"] is None
    assert "Scores stayed at the sites" in page(folder)
    assert "its training rows, times and steps, kept in" in page(folder)
    public = {"privacy__metrics": "exact", "run__baselines": True, "run__rounds": 1}
    folder, _ = simulate(nodes, "exact", FAST | public)
    assert len(rows(folder, "baseline")) == 4
    assert "Training alone and on pooled rows had no noise" in page(folder)
    assert "held-out rows are public" in page(folder)


def test_scores_leave_with_noise_and_are_accounted(nodes: Nodes, shared: Shared) -> None:
    keys = SEEDED | {"privacy__metrics": "noised", "privacy__metrics_noise_multiplier": 0.5}
    folder, _ = simulate(nodes, "noised", keys)
    exact, _ = shared.simulate(SEEDED, privacy__metrics="exact")
    assert bytes_below(folder / "adapter") == bytes_below(exact / "adapter")
    for row, other in zip(rows(folder, "evaluation"), rows(exact, "evaluation"), strict=True):
        assert row["loss"] != other["loss"]
        assert 0 <= row["loss"] <= 8
    for ledger in ledgers(folder):
        held_out = [e for e in ledger.events() if e.part == "held-out"]
        assert [(e.round, e.count) for e in held_out] == [(1, 2), (2, 2), (2, 1)]
        assert {(e.noise_multiplier, e.sample_rate) for e in held_out} == {(0.5, 1.0)}
        told = json.loads((folder / "summary.json").read_text())["privacy"]
        assert told["sites"][ledger.path.parent.name] == pytest.approx(spent(ledger.events(), 1e-5))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_held_out_rows_spend_the_same_epsilon(nodes: Nodes, fraction: float) -> None:
    config = parse(
        nodes.flat(
            privacy__unit="record", privacy__epsilon=2.0, privacy__metrics="noised",
            strategy__fraction=fraction, run__rounds=5,
        )
    )  # fmt: skip
    events = [replace(e, split="one") for e in planned(config, 40, range(1, 6))]
    for part in ("training", "held-out"):
        assert 1.95 < spent([e for e in events if e.part == part], 1e-5) <= 2.0
    assert 1.95 < spent(events, 1e-5) <= 2.0
    count = sum(e.count for e in events if e.part == "held-out")
    assert count == (11 if fraction == 1.0 else 12)
    assert metrics_noise(config) > 3


def test_a_method_that_is_not_exact_is_refused_at_the_roll_call(nodes: Nodes) -> None:
    keys = SEEDED | {"payload__kind": "adapter"}
    told = nodes.member(nodes.simulated(0), privacy__per_sample="ghost", **keys)
    assert "privacy.per-sample='auto'" in told["error"]
    assert "error" not in nodes.member(nodes.simulated(0), **keys)
    _, report = nodes.train(nodes.simulated(0), **keys)
    assert "error" not in report


@pytest.mark.parametrize(
    "keys",
    [
        {"payload__kind": "soft-prompt"},
        {"payload__kind": "prefix"},
        {"payload__kind": "full", "train__grad_accumulation": 2},
        {"train__prox_mu": 0.1, "payload__personal": "lora_B"},
        {"strategy__rule": "lora-alternate"},
        {
            "train__correction": "scaffold", "train__optimizer": "sgd",
            "strategy__weighting": "uniform",
        },
    ],
    ids=lambda keys: ",".join(map(str, keys.values())),
)  # fmt: skip
def test_payloads_and_corrections_train_in_private(nodes: Nodes, keys: dict[str, Any]) -> None:
    folder, _ = simulate(nodes, "run", FAST, **keys)
    assert [row["status"] for row in rows(folder, "site")] == ["ok"] * 6  # of two rounds


def test_a_site_of_lower_rank_sends_zeros_above_it(nodes: Nodes) -> None:
    keys = SEEDED | {"payload__site_ranks": "1", "strategy__rule": "lora-svd"}
    delta, report = nodes.train(nodes.simulated(0), start=nodes.start(**keys), **keys)
    assert report["rank"] == 1
    first = next(t for n, t in delta.items() if "lora_B" in n)
    assert float(first[:, 0].abs().min()) > 0


def test_a_long_document_is_one_record(nodes: Nodes) -> None:
    short = nodes.member(nodes.simulated(0), **SEEDED)
    cut = nodes.member(nodes.simulated(0), train__max_length=4, **SEEDED)
    assert cut["rows"] == short["rows"]
    _, report = nodes.train(nodes.simulated(0), train__max_length=4, **SEEDED)
    assert report["examples"] == short["rows"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train__packing": "on"}, r"train\.packing='off' or 'auto' with privacy\.unit='record'"),
        ({"train__ditto_lambda": 0.1}, r"train\.ditto-lambda=0 .*payload\.personal"),
        ({"run__baselines": True}, r"privacy\.metrics='exact' with run\.baselines=true"),
        ({"privacy__metrics": "noised"}, r"privacy\.metrics-noise-multiplier above 0"),
        ({"privacy__metrics_noise_multiplier": 2.0}, r"privacy\.metrics='noised' with"),
        (
            {
                "privacy__metrics": "noised",
                "privacy__epsilon": 1.0,
                "privacy__noise_multiplier": 0.0,
                "data__eval_source": "rows.jsonl",
            },
            r"held-out rows of their own \(data\.eval-source\)",
        ),
    ],
)
def test_what_would_break_the_guarantee_is_refused(
    nodes: Nodes, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        compose.check_names(parse(nodes.flat(**DP | keys)))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"privacy__noise_source": "seeded"}, "privacy.noise-source='secure' at a deployed site"),
        ({"privacy__metrics": "exact"}, "privacy.metrics='withheld' or 'noised' at a deployed"),
    ],
)  # fmt: skip
def test_what_only_simulations_may_do_is_refused_at_a_deployed_site(
    nodes: Nodes, keys: dict[str, Any], said: str
) -> None:
    node = nodes.deployed("east", state_path=str(nodes.folder / "state"))
    assert said in nodes.member(node, data__partition="own", **DP | keys)["error"]
    _, report = nodes.train(node, data__partition="own", **DP | keys)
    assert said in report["error"]
