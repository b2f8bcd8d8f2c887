"""The adversary between sites and gate: what is rewritten, and what the round makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from flower_app import compose
from flower_app import run as server
from flower_app.adversary import Adversary
from flower_app.config import defaults, parse
from models.layout import Layout
from models.section import ConfigError
from models.seeds import derive
from strategies import messages, registry
from strategies.attacks.config import AttackConfig
from strategies.attacks.malformed import FAULTS
from strategies.attacks.registry import ATTACKS, pick
from strategies.attacks.view import View
from strategies.config import StrategyConfig
from strategies.flower import ComposedStrategy, RoundOutcome, Tamper
from strategies.messages import SiteOutcome, decode_all, to_record
from tests.fakes import Answer, FakeGrid, Site, at_the_server
from tests.flower_app.test_run import config as run_config
from tests.flower_app.test_run import site as failing

LAYOUT = Layout(("h.lora_A.weight", "h.lora_B.weight", "head.weight"), ((2, 3), (4, 2), (3, 4)))
START = LAYOUT.unflatten(torch.linspace(-1, 1, LAYOUT.size))
HONEST = tuple(f"site-{i:02}" for i in range(9))
BAD = ("site-90", "site-91")
WRONG = tuple(f"wrong-{i:02}" for i in range(20))
NODES = {name: 1000 + 7 * i for i, name in enumerate((*HONEST, *BAD, *WRONG))}


@pytest.fixture(autouse=True)
def at_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(messages, "_POLL_S", 0.001)
    with at_the_server():
        yield


def delta(name: str, round_: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive(0, name, round_))
    return 0.1 * torch.randn(LAYOUT.size, generator=generator)


def site(name: str) -> Site:
    def answer(question: Message) -> Iterable[Answer]:
        if question.metadata.message_type == "evaluate":
            return [Answer(report={})]
        round_ = int(str(question.content.config_records["plan"]["round"]))
        arrays = to_record(LAYOUT.unflatten(delta(name, round_)))
        report = {"round": round_, "layout": LAYOUT.digest, "num-examples": 30 + len(name)}
        return [Answer(dict(arrays), dict(report))]  # type: ignore[arg-type]

    return answer


class Log:
    def __init__(self) -> None:
        self.rounds: list[RoundOutcome] = []

    def asked(self, kind: str, round_: int, sites: Sequence[str]) -> None:
        """Nothing to do."""

    def round_finished(self, outcome: RoundOutcome) -> None:
        self.rounds.append(outcome)

    def evaluated(self, round_: int, sites: Iterable[SiteOutcome]) -> None:
        pass


def adversary(attack: str, names: Iterable[str] = BAD, **options: Any) -> Adversary:
    config = AttackConfig.model_validate({"name": attack, **options})
    return Adversary(pick(config), config, frozenset(names), LAYOUT, 3)


def run(
    folder: Path, names: Iterable[str], attack: str = "none", *, seed: int = 0, rule: str = "mean",
    options: Mapping[str, Any] | None = None, tamper: Tamper | None = None, **settings: Any,
) -> tuple[bytes, Log]:  # fmt: skip
    """Two rounds over the sites `names`, of which BAD are malicious; the last payload's bytes."""
    config = StrategyConfig.model_validate({"rule": rule, **settings})
    log = Log()
    strategy = ComposedStrategy(
        config, registry.build(config), LAYOUT, seed=3, quorum=0.3,
        members=lambda grid, done: {name: NODES[name] for name in names},
        plan=lambda round_, site: {}, spool=folder / "spool", listener=log,
        tamper=tamper or adversary(attack, **(options or {})).tamper,
        trusted=lambda round_, received, folded: {n: -0.3 * t for n, t in received.items()},
    )  # fmt: skip
    grid = FakeGrid({NODES[name]: site(name) for name in names}, seed=seed)
    result = strategy.start(grid, to_record(START), num_rounds=2, timeout=20)
    return LAYOUT.flatten(decode_all(result.arrays)).numpy().tobytes(), log


def by_site(log: Log, round_: int = 1) -> dict[str, SiteOutcome]:
    return {outcome.site: outcome for outcome in log.rounds[round_ - 1].sites}


RULES = sorted(registry.RULES)
MALFORMED = sorted(set(FAULTS) - {"duplicate"})


def assert_refused(log: Log, name: str, fault: str) -> None:
    for round_ in (1, 2):
        outcome = by_site(log, round_)[name]
        assert outcome.status == "quarantined"
        assert outcome.reason.startswith(f"{FAULTS[fault].kind}: ")


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_reply_meets_its_refusal_and_leaves_no_trace(
    fault: str, tmp_path: Path
) -> None:
    got, log = run(tmp_path, (*HONEST, *BAD), fault)
    assert got == run(tmp_path, HONEST)[0]
    for name in BAD:
        assert_refused(log, name, fault)
    assert all(by_site(log, round_)[n].status == "ok" for round_ in (1, 2) for n in HONEST)


@pytest.mark.parametrize("rule", RULES)
def test_all_of_them_at_once_leave_no_trace_in_any_rule(rule: str, tmp_path: Path) -> None:
    wrong = dict(zip(WRONG, MALFORMED, strict=False))
    assert len(wrong) == len(MALFORMED)
    got, log = run(tmp_path, (*HONEST, *wrong), tamper=chained(wrong), rule=rule)
    assert got == run(tmp_path, HONEST, rule=rule)[0]
    for name, fault in wrong.items():
        assert_refused(log, name, fault)
    assert all(by_site(log, round_)[n].status == "ok" for round_ in (1, 2) for n in HONEST)


def chained(attacks: Mapping[str, str]) -> Tamper:
    """Adversaries one after the other, each with one site of its own."""
    adversaries = [adversary(attack, {name}) for name, attack in attacks.items()]

    def tamper(
        round_: int, asked: Mapping[int, str], base_D: Tensor, replies: Iterable[Message]
    ) -> Iterable[Message]:
        for each in adversaries:
            replies = each.tamper(round_, asked, base_D, replies)
        return replies

    return tamper


@pytest.mark.parametrize("rule", RULES)
def test_of_a_duplicate_the_first_counts(rule: str, tmp_path: Path) -> None:
    everyone = (*HONEST, *BAD)
    got, log = run(tmp_path, everyone, "duplicate", rule=rule)
    assert got == run(tmp_path, everyone, rule=rule)[0]
    # The sites' own good updates count; krum may choose another one all the same.
    assert rule == "krum" or got != run(tmp_path, HONEST, rule=rule)[0]
    assert by_site(log)[BAD[0]].reason.startswith("duplicate: ")


@pytest.mark.parametrize("attack", sorted(set(ATTACKS) - set(FAULTS)))
def test_an_attack_sends_what_it_forged_whatever_the_order_of_replies(
    attack: str, tmp_path: Path
) -> None:
    got, log = run(tmp_path, (*HONEST, *BAD), attack)
    assert run(tmp_path, (*HONEST, *BAD), attack, seed=5)[0] == got
    assert all(outcome.status == "ok" for outcome in log.rounds[0].sites)
    honest = run(tmp_path, (*HONEST, *BAD))[0]
    assert (got == honest) == (not ATTACKS[attack].rewrites)


def test_the_mean_of_a_sign_flip_is_the_one_worked_out_by_hand(tmp_path: Path) -> None:
    _, log = run(
        tmp_path, (*HONEST, *BAD), "sign-flip", options={"scale": 2.0}, weighting="uniform"
    )
    rows = [delta(name, 1) for name in HONEST] + [-2 * delta(name, 1) for name in BAD]
    after = LAYOUT.flatten(log.rounds[0].payload) - LAYOUT.flatten(START)
    assert torch.allclose(after, torch.stack(rows).mean(0), atol=1e-6)


def test_inflated_weights_are_capped(tmp_path: Path) -> None:
    capped, _ = run(tmp_path, (*HONEST, *BAD), "weight-inflation", weight_cap=10)
    assert capped == run(tmp_path, (*HONEST, *BAD), weighting="uniform")[0]
    assert capped != run(tmp_path, (*HONEST, *BAD), "weight-inflation")[0]


def test_a_site_that_fails_is_left_alone(tmp_path: Path) -> None:
    grid = FakeGrid({1: lambda question: [Answer(report={"error": "disk"})]})
    question = Message(messages.RecordDict(), 1, "train")
    (reply,) = messages.collect(grid, [question], 5)
    shown = adversary("sign-flip").tamper(1, {1: BAD[0]}, torch.zeros(LAYOUT.size), [reply])
    assert list(shown) == [reply]


def test_a_resumed_run_meets_the_same_attack(tmp_path: Path) -> None:
    sent = []
    for _ in range(2):  # a new process knows nothing of earlier rounds
        grid = FakeGrid({NODES[name]: site(name) for name in (*HONEST, *BAD)}, seed=len(sent))
        plan = messages.RecordDict({"plan": messages.ConfigRecord({"round": 2})})
        replies = messages.collect(grid, [Message(plan, node, "train") for node in grid.sites], 5)
        asked = {node: name for name, node in NODES.items()}
        shown = adversary("gaussian").tamper(2, asked, torch.zeros(LAYOUT.size), replies)
        found = {asked[m.metadata.src_node_id]: decode_all(m.content.array_records["arrays"])
                 for m in shown}  # fmt: skip
        sent.append(torch.stack([LAYOUT.flatten(found[name]) for name in BAD]))
        assert torch.equal(LAYOUT.flatten(found[HONEST[0]]), delta(HONEST[0], 2))
    assert torch.equal(*sent)
    assert not any(math.isnan(value) for value in sent[0].flatten().tolist())


def test_attacks_of_a_run_are_composed_by_name() -> None:
    flat = {**defaults(), "attack.name": "sign-flip"}
    assert compose.adversary(parse(flat), LAYOUT, HONEST) is not None
    assert compose.adversary(parse(flat | {"attack.name": "none"}), LAYOUT, HONEST) is None
    with pytest.raises(ConfigError, match=r"attack\.name 'sgin-flip'.*Did you mean 'sign-flip'"):
        compose.check_names(parse(flat | {"attack.name": "sgin-flip"}))
    with pytest.raises(ConfigError, match=r"data\.format='classification'.*'text'"):
        compose.check_names(parse(flat | {"attack.name": "backdoor"}))


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.pairs])
@pytest.mark.parametrize(
    "keys",
    [
        {"payload.kind": "soft-prompt"},
        {"payload.kind": "adalora"},
        {"payload.personal": "lora_B"},
        {"strategy.rule": "lora-freeze-a"},
        {"strategy.rule": "lora-share-a"},
    ],
)
def test_attacks_on_pairs_are_refused_before_the_run_where_none_travel(
    name: str, keys: dict[str, Any]
) -> None:
    attacked = {**defaults(), "attack.name": name}
    compose.check_names(parse(attacked))
    compose.check_names(parse({**attacked, "strategy.rule": "lora-alternate"}))
    with pytest.raises(ConfigError, match=f"travel whole with attack.name='{name}', got none; set"):
        compose.check_names(parse({**attacked, **keys}))


def test_the_attacks_on_pairs_are_those_that_find_none_in_another_payload() -> None:
    layout = Layout(("w",), ((3,),))
    view = View(torch.ones(2, 3), torch.ones(1, 3), torch.zeros(3), layout)
    for name, attack in ATTACKS.items():
        options, generator = AttackConfig(name=name), torch.Generator().manual_seed(0)
        if attack.pairs:
            with pytest.raises(ConfigError, match="travel whole"):
                attack.forged(view, options, generator)
        else:
            assert attack.forged(view, options, generator).shape == (1, 3)


def test_attacks_are_refused_in_a_deployment(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    model = tiny_models["llama"]
    flat = run_config(model, tmp_path).flat()
    wrong = parse(flat | {"attack.name": "ipm", "data.partition": "natural"})
    own = wrong.model_copy(update={"data": run_config(model, tmp_path).data})
    grid = FakeGrid({1: failing("ann", model, "")})
    with pytest.raises(ConfigError, match=r"attack\.name='none' with deployed.*ann.*'ipm'"):
        server.run(grid, own)


def test_all_sites_of_a_simulation_take_part_in_one_with_an_attack(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    model = tiny_models["llama"]
    flat = run_config(model, tmp_path).flat()
    attacked = parse(flat | {"attack.name": "ipm", "data.partition": "iid"})
    one = failing("ann", model, "", simulated=True, partitions=2)
    other = failing("bob", model, "", simulated=True, partitions=2, base="another")
    with pytest.raises(ConfigError, match=r"all 2 simulated sites.*'ipm', got 1"):
        server.run(FakeGrid({1: one, 2: other}), attacked)
