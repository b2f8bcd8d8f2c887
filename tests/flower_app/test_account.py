"""A site's account: refused at the roll call, charged before training, the same across runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flower_app.account import SiteAccount, ledger_path
from flower_app.config import parse
from flower_app.node import parse_node
from flower_app.releases import record_plan, releases
from models.section import ConfigError
from privacy.accounting import epsilon, spent
from privacy.events import Event
from privacy.ledger import Ledger
from privacy.policy import PolicyError
from tests.flower_app.nodes import Nodes

DP: dict[str, Any] = {"privacy__unit": "record", "privacy__noise_multiplier": 1.0}
BUDGET = "max-epsilon = 3.0\nmax-rounds = 50\n"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def policy(folder: Path, text: str = BUDGET) -> str:
    path = folder / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def account(
    nodes: Nodes, node: dict[str, Any], plan: dict[str, Any] | None = None, rows: int = 40,
    **keys: Any,
) -> SiteAccount:  # fmt: skip
    config = parse(nodes.flat(**keys))
    told = {"run": "a-run"} if plan is None else plan
    return SiteAccount(config, parse_node(node), told, site="east", rows=rows, base="c0ffee")


def events_of(nodes: Nodes, rows: int, rounds: range, **keys: Any) -> list[Event]:
    return releases(parse(nodes.flat(**keys)), rows, rounds)


def test_what_a_run_releases_about_records(nodes: Nodes) -> None:
    keys = DP | {"train__steps": 0, "train__epochs": 1.5, "train__grad_accumulation": 2}
    given = record_plan(parse(nodes.flat(**keys)), 40)
    assert (given.noise_multiplier, given.sample_rate, given.steps) == (1.0, 0.2, 8)
    assert record_plan(parse(nodes.flat(**keys)), 5).sample_rate == 1.0
    events = events_of(nodes, 40, range(1, 3), **keys)
    assert [(e.count, e.round, e.sample_rate) for e in events] == [(8, 1, 0.2), (8, 2, 0.2)]
    assert events_of(nodes, 40, range(1, 3)) == []


def test_noise_is_calibrated_for_the_whole_run(nodes: Nodes) -> None:
    keys: dict[str, Any] = {
        "privacy__unit": "record", "privacy__epsilon": 2.0, "run__rounds": 10, "train__steps": 3,
    }  # fmt: skip
    whole = events_of(nodes, 40, range(1, 11), **keys)
    assert 1.99 < spent(whole, 1e-5) <= 2.0
    assert events_of(nodes, 40, range(4, 5), **keys) == [whole[3]]


def test_a_delta_that_needs_no_noise_is_refused_for_given_noise_too(nodes: Nodes) -> None:
    """Else the epsilon of almost no noise would be 0."""
    keys: dict[str, Any] = {
        "privacy__unit": "record", "privacy__noise_multiplier": 0.001, "run__rounds": 1,
        "train__steps": 1, "train__batch_size": 1,
    }  # fmt: skip
    assert epsilon(0.001, 1 / 200_000, 1, 1e-5) == 0.0
    with pytest.raises(ConfigError, match="Expected a delta below 5e-06, the chance"):
        events_of(nodes, 200_000, range(1, 2), **keys)
    assert events_of(nodes, 200_000, range(1, 2), **keys | {"privacy__delta": 1e-6})
    many = keys | {"run__rounds": 30}
    assert events_of(nodes, 200_000, range(1, 2), **many)


def test_a_run_beyond_the_budget_is_refused_at_the_roll_call(
    nodes: Nodes, tmp_path: Path, state: Path
) -> None:
    node = nodes.deployed("east", state_path=str(state), policy_path=policy(tmp_path))
    keys: dict[str, Any] = {
        "data__partition": "own", "run__rounds": 40, "privacy__unit": "record",
        "privacy__noise_multiplier": 2.0,
    }  # fmt: skip
    told = nodes.member(node, **keys)
    # 4 of the site's rows in each of 2 steps of 40 rounds.
    rows = nodes.member(nodes.deployed("east"), data__partition="own")["rows"]
    whole = epsilon(2.0, 4 / rows, 80, 1e-5)
    assert whole > 3.0
    assert (
        "Expected at most epsilon 3 (max-epsilon; per record, delta 1e-05, zero-out)"
        in (told["error"])
    )
    assert f"got {whole:.4g} with this run: 0 was spent before, 3 remains" in told["error"]
    assert f"its 40 rounds would by themselves spend {whole:.4g}" in told["error"]
    assert not state.exists()  # nothing was trained and nothing charged
    assert "error" not in nodes.member(node, **keys | {"run__rounds": 1})


def test_of_a_resumed_run_only_the_rounds_to_come_are_asked_for(
    nodes: Nodes, tmp_path: Path, state: Path
) -> None:
    node = nodes.deployed("east", state_path=str(state), policy_path=policy(tmp_path))
    keys = DP | {"run__rounds": 6, "train__steps": 5}
    event = events_of(nodes, 40, range(1, 2), **keys)
    left = events_of(nodes, 40, range(4, 7), **keys)
    whole = spent(event * 6, 1e-5)
    limited = node | {"policy-path": policy(tmp_path, f"max-epsilon = {whole * 1.001}")}
    for _ in range(3):
        account(nodes, limited, **keys).charge(event)
    account(nodes, limited, **keys).planned(left, rounds=3)
    with pytest.raises(PolicyError, match="its 6 rounds would"):
        account(nodes, limited, **keys).planned(events_of(nodes, 40, range(1, 7), **keys), rounds=6)
    account(nodes, limited, **keys).planned([], rounds=0)


def test_every_message_is_checked_against_what_is_left(
    nodes: Nodes, tmp_path: Path, state: Path
) -> None:
    keys = DP | {"train__steps": 5}
    event = events_of(nodes, 40, range(1, 2), **keys)
    three = spent(event * 3, 1e-5)
    node = nodes.deployed("east", state_path=str(state)) | {
        "policy-path": policy(tmp_path, f"max-epsilon = {three * 1.01}")
    }
    for run in ("a-run", "another", "a-third"):
        account(nodes, node, {"run": run}, **keys).charge(event)
    before = (state / "ledger.jsonl").read_bytes()
    with pytest.raises(PolicyError, match=r"was spent before.*round 1 would by themselves spend"):
        account(nodes, node, {"run": "a-fourth"}, **keys).charge(event)
    assert (state / "ledger.jsonl").read_bytes() == before
    kept = Ledger(state / "ledger.jsonl").events()
    assert [(e.run, e.site, e.round) for e in kept] == [
        ("a-run", "east", 1), ("another", "east", 1), ("a-third", "east", 1),
    ]  # fmt: skip
    assert len({e.split for e in kept}) == 1 and kept[0].split


@pytest.mark.parametrize("round_", [0, 3, 5000])
def test_a_round_that_the_run_does_not_have_is_not_trained(nodes: Nodes, round_: int) -> None:
    _, report = nodes.train(nodes.deployed("east"), round_, data__partition="own", run__rounds=2)
    assert report["error"] == f"Expected a round from 1 to run.rounds=2, got {round_}."


def test_a_round_that_is_asked_for_again_counts_as_another(
    nodes: Nodes, tmp_path: Path, state: Path
) -> None:
    keys: dict[str, Any] = {"data__partition": "own", "run__rounds": 3}
    rule = {"policy_path": policy(tmp_path, "max-rounds = 3")}
    node = nodes.deployed("east", state_path=str(state), **rule)
    for round_ in (1, 2, 2):
        nodes.restart()  # in deployment every message has a process of its own
        assert "error" not in nodes.train(node, round_, **keys)[1]
    assert nodes.train(node, 3, **keys)[1]["error"] == (
        "Expected at most 3 rounds of a run by this site's policy, got 4, with those that were "
        "asked for again; let the site raise max-rounds."
    )
    assert "error" not in nodes.train(node, 1, plan={"run": "another"}, **keys)[1]
    kept = Ledger(state / "ledger.jsonl").events()
    assert [event.run for event in kept] == ["a-run"] * 3 + ["another"]  # what was refused is not
    forgetful = nodes.deployed("east", **rule)
    assert all("error" not in nodes.train(forgetful, 1, **keys)[1] for _ in range(4))


def test_a_policy_is_asked_in_training_as_well(nodes: Nodes, tmp_path: Path) -> None:
    node = nodes.deployed("east", policy_path=policy(tmp_path, "max-rounds = 2"))
    keys: dict[str, Any] = {"data__partition": "own"}
    assert "error" not in nodes.member(node, run__rounds=2, **keys)
    _, report = nodes.train(node, run__rounds=2, **keys)
    assert "error" not in report
    scored = nodes.evaluate(node, nodes.start(**keys), run__rounds=3, **keys)
    assert "at most 2 rounds" in scored["error"]
    _, report = nodes.train(node, run__rounds=3, **keys)
    assert report["error"] == (
        "Expected at most 2 rounds (run.rounds) by this site's policy, got 3; lower them."
    )


@pytest.mark.parametrize(
    ("text", "keys", "said"),
    [
        (BUDGET, {}, "Expected privacy.unit='record' by this site's policy, got 'none'"),
        ("require-unit = 'record'", {}, "Expected privacy.unit='record'"),
        ("allowed-payloads = ['adapter']", {}, "payload.kind to be among adapter"),
        ("allowed-base-models = ['c0ffee']", {}, "base model to be among c0ffee"),
        ("max-rows = 3", {}, "at most 3 rows to train on"),
        ("min-rows = 3000", {}, "at least 3000 rows to train on"),
        ("min-noise-multiplier = 1.5", DP, "at least 1.5 by this site's policy, got 1 "),
        ("max-epsilom = 1", {}, "Unknown key of the site's policy 'max-epsilom'"),
    ],
)
def test_the_roll_call_says_what_a_policy_forbids(
    nodes: Nodes, tmp_path: Path, text: str, keys: dict[str, Any], said: str
) -> None:
    node = nodes.deployed(
        "east", state_path=str(tmp_path / "s"), policy_path=policy(tmp_path, text)
    )
    assert said in nodes.member(node, data__partition="own", **keys)["error"]


def test_a_missing_policy_lets_the_site_take_part_in_nothing(nodes: Nodes, tmp_path: Path) -> None:
    node = nodes.deployed("east", policy_path=str(tmp_path / "gone.toml"))
    told = nodes.member(node, data__partition="own")
    assert "Without it the site takes part in nothing" in told["error"]
    assert str(tmp_path) not in told["error"]  # the operator reads the path, the server does not
    assert str(tmp_path) in nodes.errors[-1]


def test_a_budget_needs_a_place_for_the_ledger(nodes: Nodes, tmp_path: Path) -> None:
    told = nodes.member(nodes.deployed("east"), data__partition="own", **DP)
    assert (
        "Expected 'state-path' in this node's config, since privacy.unit='record'" in told["error"]
    )
    node = nodes.deployed("east", policy_path=policy(tmp_path))
    with pytest.raises(ConfigError, match="since max-epsilon of this site's policy"):
        account(nodes, node)


def test_a_changed_ledger_stops_the_site(nodes: Nodes, tmp_path: Path, state: Path) -> None:
    node = nodes.deployed("east", state_path=str(state))
    account(nodes, node, **DP).charge(events_of(nodes, 40, range(1, 3), **DP))
    (state / "ledger.jsonl").write_bytes(b"")
    told = nodes.member(node, data__partition="own", **DP)
    assert told["error"] == "LedgerError: the log at the site says what is wrong."
    assert "2 lines were written and 0 are there" in nodes.errors[-1]


def test_a_round_without_noise_is_not_passed_over(
    nodes: Nodes, tmp_path: Path, state: Path
) -> None:
    node = nodes.deployed("east", state_path=str(state))
    private = events_of(nodes, 40, range(1, 2), **DP)
    account(nodes, node, **DP).charge(private)
    kept = Ledger(state / "ledger.jsonl")
    assert kept.spent("record", 1e-5) == spent(private, 1e-5)
    account(nodes, node).charge([])
    assert [event.mechanism for event in kept.events()] == ["gaussian", "none"]
    assert kept.spent("record", 1e-5) == float("inf")


def test_rows_that_left_without_noise_get_no_epsilon_later(
    nodes: Nodes, tmp_path: Path, state: Path
) -> None:
    """The ledger begins with the first release, not with the first one that has noise."""
    node = nodes.deployed("east", state_path=str(state))
    own: dict[str, Any] = {"data__partition": "own"}
    assert "error" not in nodes.train(node, **own)[1]
    assert "error" not in nodes.train(node, **DP, **own)[1]
    kept = Ledger(state / "ledger.jsonl")
    assert [event.mechanism for event in kept.events()] == ["none", "gaussian"]
    assert kept.spent("record", 1e-5) == kept.spent("client", 1e-5) == float("inf")
    told = nodes.member(node | {"policy-path": policy(tmp_path, "max-epsilon = 100")}, **DP, **own)
    assert "no bound at all was spent before, 0 remains" in told["error"]
    assert told["error"].endswith("leave this site out, whose ledger has releases without noise.")


def test_a_stream_without_noise_leaves_none_for_its_positions(nodes: Nodes, state: Path) -> None:
    node = nodes.deployed("east", state_path=str(state))
    account(nodes, node, payload__kind="split").charge([])
    kept = Ledger(state / "ledger.jsonl")
    assert {event.unit for event in kept.events()} == {"record", "position"}
    assert kept.spent("record", 1e-5) == kept.spent("position", 1e-5) == float("inf")
    account(nodes, node).charge([])
    assert len(kept.events()) == 3  # beside no stream there is no position


def test_nothing_is_written_where_there_is_no_place_or_no_account(
    nodes: Nodes, tmp_path: Path
) -> None:
    account(nodes, nodes.deployed("east")).charge([])
    account(nodes, nodes.simulated(0), {"state": str(tmp_path / "sites")}).charge([])
    assert not list(tmp_path.rglob("ledger.jsonl*"))


CLIENT: dict[str, Any] = {
    "privacy__unit": "client", "privacy__noise_multiplier": 1.0, "data__partition": "own",
    "strategy__weighting": "uniform",
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        # Noise for records, as little as the server likes, would be no release of a client's.
        (
            {
                "privacy__place": "local",
                "privacy__metrics": "noised",
                "privacy__metrics_noise_multiplier": 1e-9,
            },
            "Expected privacy.metrics='withheld' or 'exact' with privacy.unit='client'",
        ),
        ({"privacy__place": "central"}, "Expected noise that this site adds by this site's policy"),
        (
            {"privacy__place": "local", "privacy__noise_multiplier": 0.1},
            "Expected a noise multiplier of at least 0.5 by this site's policy, got 0.1",
        ),
        ({"privacy__place": "local"}, ""),
    ],
)
@pytest.mark.parametrize("done", [0, 2])
def test_a_score_alone_is_judged_by_what_its_run_releases(
    nodes: Nodes, tmp_path: Path, state: Path, keys: dict[str, Any], said: str, done: int
) -> None:
    text = "max-epsilon = 100.0\nmin-noise-multiplier = 0.5\nrequire-unit = 'client'\n"
    node = nodes.deployed("east", state_path=str(state), policy_path=policy(tmp_path, text))
    told = nodes.evaluate(node, nodes.start(), done, **CLIENT | keys)
    assert told.get("error", "").startswith(said)
    assert ("error" in told) == bool(said)
    assert not told.get("before-counted")


def test_scores_without_noise_are_not_passed_over(nodes: Nodes, state: Path) -> None:
    node = nodes.deployed("east", state_path=str(state))
    own: dict[str, Any] = {"data__partition": "own"}
    assert nodes.evaluate(node, nodes.start(), **own)["before-counted"] > 0
    account(nodes, node, **DP).charge(events_of(nodes, 40, range(1, 2), **DP))
    kept = Ledger(state / "ledger.jsonl").events()
    assert [(event.mechanism, event.part) for event in kept] == [
        ("none", "held-out"), ("gaussian", "training"),
    ]  # fmt: skip


def test_in_a_simulation_the_ledger_is_the_runs_own(nodes: Nodes, tmp_path: Path) -> None:
    node = nodes.simulated(0)
    account(nodes, node, {"state": str(tmp_path / "sites")}, **DP).charge(
        events_of(nodes, 40, range(1, 2), **DP)
    )
    assert len(Ledger(tmp_path / "sites" / "east" / "ledger.jsonl").events()) == 1
    assert ledger_path(parse_node(node), {}, "east") is None


def test_held_out_rows_that_may_be_training_rows_elsewhere_are_not_parallel(
    nodes: Nodes, tmp_path: Path, state: Path
) -> None:
    node = nodes.deployed("east", state_path=str(state))
    events = events_of(nodes, 40, range(1, 2), **DP)
    for given, seed in [(node, 0), (node, 1), (node | {"eval-path": "/some/file"}, 0)]:
        account(nodes, given, run__seed=seed, **DP).charge(events)
    first, second, third = [e.split for e in Ledger(state / "ledger.jsonl").events()]
    assert first != second and first and second
    assert third == ""
