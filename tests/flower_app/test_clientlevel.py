"""Client-level privacy in whole runs: what is released, charged, resumed, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flower_app import clientlevel, compose
from flower_app.config import parse
from flower_app.releases import releases
from models.layout import Layout
from models.section import ConfigError
from privacy.accounting import epsilon, spent
from privacy.events import Event
from privacy.ledger import Ledger
from strategies.cohort import Cohort
from strategies.flower import RoundError
from strategies.stage import ComposeError
from tests.flower_app.nodes import NAMES, Nodes, raw
from tests.flower_app.runs import Killed, bytes_below, killed_in, rows, run, simulate

CENTRAL: dict[str, Any] = {
    "privacy__unit": "client",
    "privacy__noise_multiplier": 1.2,
    "privacy__clip_norm": 0.1,
    "privacy__noise_source": "seeded",
    "strategy__weighting": "uniform",
}
SHARED = CENTRAL | {"privacy__place": "distributed", "secure__aggregation": "masks"}
LOCAL = CENTRAL | {"privacy__place": "local", "strategy__weighting": "examples"}


def charged(folder: Path) -> list[Event]:
    """What the server released in this run, by the ledger of its output folder."""
    return Ledger(folder.parent / "ledger.jsonl").events()


def test_a_run_is_charged_in_every_round_and_can_be_repeated(nodes: Nodes) -> None:
    folder, _ = simulate(nodes, "one", CENTRAL, strategy__fraction=0.5, run__rounds=3)
    events = charged(folder)
    assert [event.round for event in events] == [1, 2, 3]
    assert {(e.noise_multiplier, e.sample_rate, e.noise_at) for e in events} == {
        (1.2, 0.5, "server")
    }
    assert spent(events, 1e-5) == pytest.approx(epsilon(1.2, 0.5, 3, 1e-5))
    again, _ = simulate(nodes, "two", CENTRAL, strategy__fraction=0.5, run__rounds=3)
    assert bytes_below(folder / "adapter") == bytes_below(again / "adapter")


@pytest.mark.parametrize("source", ["secure", "seeded"])
def test_only_seeded_noise_and_sampling_can_be_repeated(nodes: Nodes, source: str) -> None:
    keys = CENTRAL | {"privacy__noise_source": source, "strategy__fraction": 0.5}
    config = parse(nodes.flat(**keys))
    layout = Layout(("w",), ((8,),))

    def once(seed: int = 0) -> tuple[list[float], list[tuple[str, ...]]]:
        rule = compose.chain(config, 3, lambda event: None)
        generator = torch.Generator().manual_seed(seed)
        nobody = Cohort.nobody(layout, torch.zeros(8))
        delta, _ = rule.apply(rule.init(8), nobody, generator)
        selection = clientlevel.selection(config)
        assert selection is not None
        drawn = [selection.draw([str(i) for i in range(50)], round_) for round_ in (1, 2)]
        return delta.vector_D.tolist(), drawn

    (noise, drawn), (again, redrawn) = once(), once()
    assert (noise == again) == (drawn == redrawn) == (source == "seeded")
    assert noise != once(seed=1)[0]


@pytest.mark.parametrize(
    "more",
    [
        {"privacy__clipping": "adaptive"},
        {
            "privacy__noise": "correlated",
            "privacy__bands": 2,
            "strategy__fraction": 0.5,
            "strategy__server_optimizer": "momentum",
        },
    ],
    ids=["adaptive", "correlated, momentum"],
)
def test_a_resumed_run_ends_with_the_same_bytes(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    settings = CENTRAL | more | {"run__rounds": 3}
    whole, _ = simulate(nodes, "whole", settings)
    keys = {"run__output_dir": str(nodes.folder / "killed")} | settings
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    with monkeypatch.context() as killing:
        killed_in(grid, 2, killing)
        with pytest.raises(Killed):
            run(nodes, grid, **keys)
    nodes.restart()
    folder, _ = simulate(nodes, "killed", settings, run__resume="latest")
    assert bytes_below(folder / "adapter") == bytes_below(whole / "adapter")
    assert charged(folder)[-1].round == charged(whole)[-1].round
    assert len(charged(folder)) >= len(charged(whole))


@pytest.mark.usefixtures("reports")
def test_rounds_that_ask_nobody_are_released_and_charged(nodes: Nodes) -> None:
    rare = CENTRAL | {"strategy__fraction": 0.001, "run__rounds": 3}
    folder, _ = simulate(nodes, "rare", rare)
    assert [row["asked"] for row in rows(folder, "round")] == [0, 0, 0]
    assert all(row["update_norm"] > 0 for row in rows(folder, "round"))
    assert [event.round for event in charged(folder)] == [1, 2, 3]
    assert (folder / "report.html").is_file()
    assert json.loads((folder / "summary.json").read_text())["rounds"] == 3


def test_rounds_that_nobody_answers_are_released_and_charged(nodes: Nodes) -> None:
    """Without privacy the same run ends for want of a quorum."""
    broken = {"train__learning_rate": 1e30, "run__rounds": 2}
    with pytest.raises(RoundError, match="at least 2 of 3 sites"):
        simulate(nodes, "plain", broken)
    folder, _ = simulate(nodes, "private", CENTRAL, **broken)
    assert [row["ok"] for row in rows(folder, "round")] == [0, 0]
    assert {row["status"] for row in rows(folder, "site")} <= {"failed", "quarantined"}
    assert [event.round for event in charged(folder)] == [1, 2]


def test_turns_are_charged_once_a_period(nodes: Nodes) -> None:
    turns = CENTRAL | {
        "privacy__noise": "correlated", "strategy__fraction": 0.5, "run__rounds": 4,
    }  # fmt: skip
    folder, _ = simulate(nodes, "turns", turns)
    assert [(e.round, e.sample_rate) for e in charged(folder)] == [(1, 1.0), (3, 1.0)]
    asked = [
        {row["site"] for row in rows(folder, "site") if row["round"] == at} for at in (1, 2, 3, 4)
    ]
    assert asked[0] == asked[2] and asked[1] == asked[3] and not asked[0] & asked[1]
    assert asked[0] | asked[1] == set(NAMES)


def test_the_noise_is_calibrated_for_the_whole_run(nodes: Nodes) -> None:
    target = CENTRAL | {"privacy__noise_multiplier": 0.0, "privacy__epsilon": 4.0}
    for more, sampled, steps in (
        ({"strategy__fraction": 0.5, "run__rounds": 6}, 0.5, 6),
        ({"strategy__fraction": 0.5, "run__rounds": 6, "privacy__noise": "correlated"}, 1.0, 3),
        ({"strategy__fraction": 0.5, "run__rounds": 6, "privacy__place": "local"}, 1.0, 6),
    ):
        config = parse(nodes.flat(**(target | more)))
        noise = clientlevel.noise_multiplier(config)
        assert epsilon(noise, sampled, steps, 1e-5) == pytest.approx(4.0, rel=0.01)


def test_a_calibrated_run_cannot_be_made_longer(nodes: Nodes) -> None:
    target = CENTRAL | {"privacy__noise_multiplier": 0.0, "privacy__epsilon": 4.0}
    simulate(nodes, "run", target, run__rounds=1)
    with pytest.raises(ConfigError, match=r"noise of the run to resume .*set run.rounds back"):
        simulate(nodes, "run", target, run__rounds=2, run__resume="latest")


def test_local_noise_is_added_before_anything_leaves(nodes: Nodes) -> None:
    local = LOCAL | {"strategy__rule": "median"}
    folder, _ = simulate(nodes, "local", local)
    assert not (folder.parent / "ledger.jsonl").exists()
    ledgers = sorted((folder / "sites").rglob("ledger.jsonl"))
    assert len(ledgers) == 3
    for path in ledgers:
        events = Ledger(path).events()
        assert [(e.round, e.unit, e.noise_at) for e in events] == [
            (1, "client", "site"), (2, "client", "site"),
        ]  # fmt: skip
    for row in rows(folder, "site"):
        assert not {"train_loss", "tokens", "useful_tokens"} & set(row)
        assert row["loss_before"] is None
    start = nodes.start(**local)
    sent, _ = nodes.train(nodes.simulated(0), 1, start, **local)
    exact, _ = nodes.train(nodes.simulated(0), 1, start)
    size = sum(tensor.numel() for tensor in sent.values())
    noise = sum(float((sent[n] - exact[n]).double().square().sum()) for n in sent)
    # The exact update is clipped to 0.1, so that nearly all of the difference is noise.
    assert (noise / size) ** 0.5 == pytest.approx(0.12, rel=0.2)


def test_noise_in_shares_has_its_scale_in_the_model_and_is_charged_at_the_sites(
    nodes: Nodes,
) -> None:
    folder, _ = simulate(nodes, "shared", SHARED, run__rounds=1)
    again, _ = simulate(nodes, "again", SHARED, run__rounds=1)
    assert bytes_below(folder / "adapter") == bytes_below(again / "adapter")
    assert not (folder.parent / "ledger.jsonl").exists()
    event = Event("discrete-gaussian", "client", 1.2, noise_at="sites", round=1)
    for path in (folder / "sites").rglob("ledger.jsonl"):
        (charged_,) = Ledger(path).events()
        assert replace(charged_, run="", site="", split="") == event
    told = json.loads((folder / "summary.json").read_text())["privacy"]
    assert told["epsilon"] == spent([event], 1e-5) and told["accountant"] == "RDP"
    assert any("each site knows its own" in line for line in told["assumptions"])
    assert all(row["loss_before"] is None for row in rows(folder, "site"))
    (row,) = rows(folder, "round")
    size = sum(t.numel() for t in nodes.start(**SHARED).values())
    # All three sites must stay, so that their sum has the noise of 0.12, of which a third counts.
    assert row["update_norm"] / size**0.5 == pytest.approx(0.04, rel=0.05)


def test_without_noise_and_clipping_shares_change_nothing(nodes: Nodes) -> None:
    plain, _ = simulate(nodes, "plain", {"strategy__weighting": "uniform"}, run__rounds=1)
    quiet = SHARED | {"privacy__noise_multiplier": 1e-7, "privacy__clip_norm": 10.0}
    folder, _ = simulate(nodes, "quiet", quiet, run__rounds=1, secure__range=0.1)
    (norm,), (plain_norm,) = ([r["update_norm"] for r in rows(f, "round")] for f in (folder, plain))
    assert norm == pytest.approx(plain_norm, rel=1e-3)


def test_noise_in_shares_is_calibrated_with_its_own_accountant(nodes: Nodes) -> None:
    target = SHARED | {"privacy__noise_multiplier": 0.0, "privacy__epsilon": 4.0}
    config = parse(nodes.flat(**target, strategy__fraction=0.5, run__rounds=6))
    noise = clientlevel.noise_multiplier(config)
    event = Event("discrete-gaussian", "client", noise, count=6)
    assert 0.995 * 4.0 < spent([event], 1e-5) <= 4.0


def test_a_site_counts_no_sampling_that_it_cannot_see(nodes: Nodes) -> None:
    config = parse(nodes.flat(**CENTRAL, strategy__fraction=0.1))
    assert releases(config, 10, [1, 2]) == [
        Event("gaussian", "client", 1.2, 1.0, noise_at="server", round=round_) for round_ in (1, 2)
    ]
    turns = parse(nodes.flat(**CENTRAL, strategy__fraction=0.5, privacy__noise="correlated"))
    assert [event.round for event in releases(turns, 10, range(1, 6))] == [1, 3, 5]
    assert [event.round for event in releases(turns, 10, [4])] == [4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy__weighting": "examples"}, r"weighting='uniform' .*got 'examples'; set it"),
        ({"strategy__rule": "median"}, r"sensitivity is proved .*got 'median'; set strategy.rule"),
        ({"strategy__pre": "nnm"}, r"sensitivity is proved .*'nnm\+mean'"),
        ({"strategy__rule": "lora-exact"}, "sensitivity is proved .*'lora-exact'"),
        ({"train__correction": "scaffold", "train__optimizer": "sgd"},
         "correction other than 'scaffold'"),
        ({"strategy__fraction": 0.4, "privacy__noise": "correlated"}, "one over a whole number"),
        ({"privacy__metrics": "noised", "privacy__metrics_noise_multiplier": 1.0},
         "metrics='withheld' or 'exact'"),
        ({"privacy__noise_multiplier": 0.0, "privacy__epsilon": 2000.0}, "target epsilon"),
        ({"privacy__place": "local", "run__baselines": True}, "no run.baselines"),
        ({"privacy__place": "local", "train__ditto_lambda": 0.1}, "no train.ditto-lambda"),
        (SHARED | {"secure__aggregation": "none"}, r"aggregation='masks' .*got 'none', where"),
        (SHARED | {"strategy__weighting": "examples"}, r"weighting='uniform' .*got 'examples'"),
        (SHARED | {"run__baselines": True}, r"no run.baselines with privacy.place='distributed'"),
        (SHARED | {"privacy__place": "central"}, r"place='local' or 'distributed' with secure"),
    ],
)  # fmt: skip
def test_what_would_make_the_guarantee_false_is_refused(
    nodes: Nodes, changes: dict[str, Any], message: str
) -> None:
    config = parse(nodes.flat(**(CENTRAL | changes)))
    with pytest.raises((ConfigError, ComposeError), match=message):
        compose.check_names(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy__place": "local", "privacy__clipping": "adaptive"}, "place='central' with"),
        ({"privacy__unit": "record", "privacy__noise": "correlated"}, "unit='client' and"),
        ({"privacy__unit": "record", "privacy__place": "local"}, "unit='client' with"),
        ({"privacy__unit": "record", "privacy__place": "distributed"}, "place='distributed', got"),
        ({"privacy__clipping": "adaptive", "privacy__noise": "correlated"}, "clipping='fixed'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    nodes: Nodes, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(nodes.flat(**(CENTRAL | changes)))


def test_a_count_without_enough_noise_is_refused_at_the_start(nodes: Nodes) -> None:
    with pytest.raises(ConfigError, match=r"clip-count-noise above 0.6"):
        simulate(nodes, "x", CENTRAL, privacy__clipping="adaptive", privacy__clip_count_noise=0.1)


def test_noise_that_the_gate_would_refuse_is_refused_at_the_start(nodes: Nodes) -> None:
    with pytest.raises(
        ConfigError, match=r"max-update-norm of at least .*norm of the sites' noise"
    ):
        simulate(nodes, "loud", LOCAL, strategy__max_update_norm=1.0)
    with pytest.raises(ConfigError, match=r"max-update-norm of at least .*norm of the sites"):
        simulate(nodes, "shares", SHARED, strategy__max_update_norm=0.5)
    with pytest.raises(ConfigError, match=r"secure.bits that hold the sum of 3 sites and its noi"):
        simulate(nodes, "coarse", SHARED, secure__bits=8)


LARGE = {"train__learning_rate": 1e39, "train__steps": 1}  # a finite loss, and then none


@pytest.mark.parametrize(("factor", "keys"), [(3e38, {}), (0.0, LARGE)])
def test_a_site_never_fails_over_what_its_noise_should_hide(
    nodes: Nodes, factor: float, keys: dict[str, Any]
) -> None:
    """Which sites fail over a poisoned weight would say who has the word that it is for."""
    start = {name: tensor + factor * tensor.sign() for name, tensor in nodes.start().items()}
    plain, told = nodes.train(nodes.simulated(0), 1, start, **keys)
    assert "error" in told or not all(bool(tensor.isfinite().all()) for tensor in plain.values())
    delta, report = nodes.train(nodes.simulated(0), 1, start, **LOCAL | keys)
    config = parse(nodes.flat(**LOCAL | keys))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    assert raw(delta) == raw(compose.sent(config, zeros, "east", 1))
    assert "error" not in report and not {"steps", "tokens", "train_loss"} & set(report)


def test_the_next_round_goes_on_from_what_the_site_kept(nodes: Nodes) -> None:
    keys = LOCAL | {"payload__personal": "lora_B"}
    start = {name: t for name, t in nodes.start().items() if "lora_A" in name}
    nodes.train(nodes.simulated(0), 1, start, **keys)
    huge = {name: tensor + 3e38 * tensor.sign() for name, tensor in start.items()}
    nodes.train(nodes.simulated(0), 2, huge, **keys)
    files = [nodes.folder / f"sites/east/round-0000{at}.safetensors" for at in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_before_a_row_is_read(nodes: Nodes, value: float) -> None:
    start = nodes.start()
    next(iter(start.values())).view(-1)[0] = value
    node = nodes.deployed("east") | {"data-path": "/no/such/rows.jsonl"}
    for told in (
        nodes.train(node, 1, start, data__partition="own")[1],
        nodes.evaluate(node, start, data__partition="own"),
    ):
        assert told["error"].startswith("Expected finite values from the server, got others in ")
