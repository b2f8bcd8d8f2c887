"""`split.noise`: what leaves on a stream is clipped, noisy, charged, and worth what is said."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flower_app.account import SiteAccount
from flower_app.config import defaults, parse
from flower_app.guarantee import guarantee
from flower_app.ledger import main
from flower_app.node import parse_node
from flower_app.releases import passes, releases
from flower_app.report import words
from flower_app.report.records import read_run
from flower_app.report.table import privacy as in_a_few_words
from flower_app.split import site as across
from flower_app.worker import Worker
from models.batches import Batches
from models.section import ConfigError
from models.split.link import FrameLink
from models.split.messages import Kind, Message
from models.text import Causal
from privacy.events import Event, of_unit
from privacy.ledger import Ledger
from privacy.policy import PolicyError
from privacy.statement import state
from privacy.tokens import epsilon_of_vectors
from tests.flower_app.nodes import NAMES, WORDS, Nodes, site_rows, write_rows
from tests.flower_app.runs import bytes_below, deploy, rows, simulate

NOISY: dict[str, Any] = {
    "payload__kind": "split", "split__wire": "fp32", "split__noise": 5.0,
    "split__clip_norm": 0.5, "split__clip_gradient": 0.01,
}  # fmt: skip
SEEDED: dict[str, Any] = NOISY | {"privacy__noise_source": "seeded"}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """All that sites put on their streams."""
    found: list[Message] = []
    ask = FrameLink._ask

    def overheard(link: FrameLink, question: Message, answer: Kind) -> Any:
        found.append(question)
        return ask(link, question, answer)

    monkeypatch.setattr(FrameLink, "_ask", overheard)
    return found


@pytest.fixture
def clipped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, float]]:
    """The vectors that noise was added to, and the norm that none of them may exceed."""
    found: list[tuple[Tensor, float]] = []
    adding = across.adding

    def watched(*given: Any) -> Any:
        add = adding(*given)

        def added(vectors: Tensor, norm: float) -> Tensor:
            found.append((vectors, norm))
            return add(vectors, norm)

        return added

    monkeypatch.setattr(across, "adding", watched)
    return found


def test_a_run_adds_noise_keeps_account_and_says_what_it_is_worth(
    nodes: Nodes,
    sent: list[Message],
    clipped: list[tuple[Tensor, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = simulate(nodes, "noisy", SEEDED)
    first = [message for message in sent if message.values is not None]
    _check_frames(first, clipped)
    ledgers = _check_ledgers(nodes, folder)
    told = _check_statement(folder, ledgers)
    assert main(["show", "--ledger", str(folder / "sites" / "east" / "ledger.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "per position (delta 1e-05, replace-one" in shown and "epsilon infinite" in shown
    card = (folder / "adapter" / "README.md").read_text("utf-8")
    assert "No differential privacy was applied: a payload can reveal" in card
    assert f"had noise: {told['text']}. That says nothing of a whole row" in card
    said = words.privacy(read_run(folder))
    assert "no claim of differential privacy for rows" in said[0] and told["text"] in said[1]

    again, count = simulate(nodes, "again", SEEDED)[0], len(sent) // 2
    assert bytes_below(again) == bytes_below(folder)
    assert [frame(message) for message in sent[count:]] == [frame(m) for m in sent[:count]]


def frame(message: Message) -> bytes:
    """A message as it travels, but for its number, which goes on as long as a worker does."""
    return replace(message, key=1).encode("fp32")


def _check_frames(messages: list[Message], clipped: list[tuple[Tensor, float]]) -> None:
    """Every vector was clipped and has noise of the right size; none leaves at padding."""
    masks: dict[int, Tensor] = {}
    noise: dict[Kind, list[Tensor]] = {Kind.FORWARD: [], Kind.BACKWARD: [], Kind.SCORE: []}
    assert len(messages) == len(clipped)
    padded = 0
    for message, (before, norm) in zip(messages, clipped, strict=True):
        assert message.values is not None
        if message.mask is not None:
            masks[message.key] = message.mask.bool()
        there = masks[message.key]
        padded += int((~there).sum())
        assert not bool(message.values[~there].any())
        assert norm == (0.01 if message.kind is Kind.BACKWARD else 0.5)
        assert len(before) == int(there.sum())
        assert float(before.norm(dim=-1).max()) <= norm * (1 + 1e-9)
        noise[message.kind].append((message.values[there].double() - before) / (5.0 * norm))
    assert padded > 0
    for parts in noise.values():
        whole = torch.cat([part.flatten() for part in parts])
        assert abs(float(whole.mean())) < 5 / math.sqrt(len(whole))
        assert abs(float(whole.pow(2).mean()) - 1) < 5 * math.sqrt(2 / len(whole))


def _check_ledgers(nodes: Nodes, folder: Path) -> dict[str, list[Event]]:
    """Each ledger holds what the rows of its site were really read, and that factors left."""
    config, worker, found = parse(nodes.flat(**SEEDED)), Worker(), {}
    paths = sorted((folder / "sites").glob("*/ledger.jsonl"))
    assert len(paths) == len(NAMES)
    for at, (name, path) in enumerate(zip(NAMES, paths, strict=True)):
        events = Ledger(path).events()
        site = worker.site(config, parse_node(nodes.simulated(at)))
        found[name] = of_unit(events, "position")
        assert {(e.site, e.noise_multiplier, e.mechanism) for e in found[name]} == {
            (name, 2.5, "gaussian")
        }
        for round_ in (1, 2):
            taken = list(site.batches.take(2 * (round_ - 1), 2))
            read = Counter(row for batch in taken for row in batch.rows)
            training = [e.count for e in found[name] if e.round == round_ and e.part == "training"]
            assert training == [2 * passes(config, site.rows, round_, len(site.batches))]
            assert training[0] >= 2 * max(read.values())
        # Before each round, and at the end of the run.
        assert [e.count for e in found[name] if e.part == "held-out"] == [1, 1, 1]
        plain = Counter((e.mechanism, e.part) for e in events if e.unit == "record")
        assert plain == {("none", "training"): 2, ("none", "held-out"): 3}
        assert state(events, "record", 1e-5).epsilon == math.inf
    return found


def _check_statement(folder: Path, ledgers: dict[str, list[Event]]) -> dict[str, Any]:
    """The summary says the epsilon of one position, which is that of the vectors in the ledger."""
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["privacy"]["unit"] == "none"
    told: dict[str, Any] = summary["privacy"]["stream"]
    assert (told["unit"], told["relation"]) == ("position", "replace-one")
    assert any("nothing is guaranteed for a row" in said for said in told["assumptions"])
    assert any("protects nobody" in said for said in told["assumptions"])
    for name, events in ledgers.items():
        vectors = sum(event.count for event in events if event.part == "training")
        expected = epsilon_of_vectors(5.0, 1e-5, vectors)
        assert told["sites"][name] == pytest.approx(expected, rel=0.01)
        assert state(events, "position", 1e-5).epsilon == pytest.approx(expected, rel=0.01)
    assert told["epsilon"] == max(told["sites"].values())
    assert "per position of the streams; none for records" in in_a_few_words(summary)
    assert all(row["batches"] > 0 for row in rows(folder, "site"))
    return told


def of_choices(nodes: Nodes, answers: int) -> dict[str, Any]:
    """Keys of a run on rows with so many answers to choose from."""
    offered = [" ".join(WORDS[:count]) for count in range(1, answers + 1)]
    written = [
        {"site": name, "instruction": row["text"], "choices": offered, "label": 0}
        for name in NAMES for row in site_rows(name, 12)
    ]  # fmt: skip
    source = write_rows(nodes.folder / "choice.jsonl", written)
    return {"data__format": "choice", "data__source": source}


@pytest.mark.parametrize(
    "others",
    [{}, {"payload__kind": "split"}, {"privacy__unit": "record", "privacy__noise_multiplier": 1.0}],
)
def test_how_many_answers_rows_have_leaves_for_the_account_of_a_stream_alone(
    nodes: Nodes, others: dict[str, Any]
) -> None:
    """One held-out row decides it, so that it would be an exact figure of private rows."""
    keys = of_choices(nodes, 3)
    assert nodes.member(nodes.simulated(0), **keys | others)["candidates"] == 0
    assert nodes.member(nodes.simulated(0), **keys | SEEDED)["candidates"] == 3


@pytest.mark.parametrize("answers", [2, 5])
def test_every_answer_that_a_row_is_scored_with_is_charged(
    nodes: Nodes, sent: list[Message], answers: int
) -> None:
    keys = SEEDED | of_choices(nodes, answers)
    folder, _ = simulate(nodes, "choice", keys)
    config, worker = parse(nodes.flat(**keys)), Worker()
    charged = 0
    for at, path in enumerate(sorted((folder / "sites").glob("*/ledger.jsonl"))):
        counts = [
            e.count for e in Ledger(path).events() if e.part == "held-out" and e.unit != "record"
        ]
        assert counts == [1 + answers] * 3
        held_out = worker.site(config, parse_node(nodes.simulated(at))).held_out_rows
        charged += sum(counts) * held_out
    left = sum(len(m.values) for m in sent if m.kind is Kind.SCORE and m.values is not None)
    assert left == charged > 0
    assert {row["candidates"] for row in rows(folder, "site")} == {answers}
    # The server says what the ledgers say, of a site too that it never heard of again.
    silent = [{"kind": "site", "site": "east", "round": at, "status": "missing"} for at in (1, 2)]
    told, more = (
        guarantee(config, silent, {"east": 8}, [], {"east": most})["stream"]["epsilon"]
        for most in (answers, 100)
    )
    assert told < more


def test_deployed_sites_draw_noise_that_does_not_repeat(nodes: Nodes, sent: list[Message]) -> None:
    first: list[Tensor] = []
    for name in ("one", "other"):
        sent.clear()
        deploy(nodes, name, NOISY, run__rounds=1)
        assert sent[0].values is not None
        first.append(sent[0].values)
        events = Ledger(nodes.folder / f"{name}-state" / "ledger.jsonl").events()
        assert {event.site for event in of_unit(events, "position")} == set(NAMES)
        assert len({event.run for event in events}) == 1 and events[0].run
    assert not torch.equal(*first)  # of the same rows, by the same model


@settings(max_examples=25, deadline=None)
@given(
    records=st.integers(1, 20), chunks=st.integers(1, 3), size=st.integers(1, 6),
    steps=st.integers(0, 5), epochs=st.sampled_from([0.3, 1.0, 2.05]), more=st.integers(1, 3),
)  # fmt: skip
def test_no_row_is_read_more_often_than_is_charged(
    records: int, chunks: int, size: int, steps: int, epochs: float, more: int
) -> None:
    keys: dict[str, float] = {"batch-size": size, "steps": steps, "grad-accumulation": more}
    keys["epochs"] = 0.0 if steps else epochs
    config = parse(defaults() | {f"train.{key}": value for key, value in keys.items()})
    token = torch.zeros(2, dtype=torch.long)
    batches = Batches(
        [Causal(token, token)] * (records * chunks), batch_size=size, seed=0, pad_id=0,
        packing=False, max_length=2,
    )  # fmt: skip
    count = config.train.steps_in_round(len(batches)) * more
    for round_ in range(1, 7):
        taken = batches.take((round_ - 1) * count, count)
        read = max(Counter(row for batch in taken for row in batch.rows).values())
        known = passes(config, records, round_, len(batches))
        assert read <= known <= passes(config, records, round_)
        if count % len(batches) == 0:
            assert read == known


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split__clip_norm": 0.0}, "Expected split.clip-norm above 0 with split.noise=5, got 0"),
        ({"split__clip_gradient": 0.0}, "Expected split.clip-gradient above 0 with split.noise=5"),
        ({"split__noise": 0.0}, "Expected split.clip-norm=0 with split.noise=0, got 0.5"),
        ({"split__noise": math.inf}, "Expected split.noise to be a finite number, got inf"),
        ({"payload__kind": "lora"}, "Expected split.noise=0 with payload.kind='lora', got 5"),
    ],
)
def test_noise_that_would_protect_nothing_is_refused(
    nodes: Nodes, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(nodes.flat(**NOISY | wrong))


@pytest.mark.parametrize(
    ("policy", "more", "message"),
    [
        ("", {"privacy__noise_source": "seeded"}, "Expected privacy.noise-source='secure' at a"),
        (None, {}, "Expected 'state-path' in this node's config, since split.noise=5 keeps"),
        ("require-unit = 'record'", {}, "Expected privacy.unit='record' by this site's policy, got "
         "'position'; ask for it."),
        ("max-epsilon = 9.0", {}, "got 'position'; ask for it, or let the site set "
         "require-unit='position'."),
        ("require-unit = 'position'\nmin-noise-multiplier = 2.6", {}, "Expected a noise multiplier "
         "of at least 2.6 by this site's policy, got 2.5 (training rows); raise split.noise"),
        ("require-unit = 'position'\nmax-epsilon = 1.0", {}, "Expected at most epsilon 1 "
         "(max-epsilon; per position, delta 1e-05, replace-one)"),
        ("require-unit = 'position'", {"split__noise": 0.0, "split__clip_norm": 0.0,
         "split__clip_gradient": 0.0}, "Expected split.noise above 0 by this site's policy, got "
         "'none'; ask for it."),
        ("require-unit = 'position'\nmax-epsilon = 9.0\nmin-noise-multiplier = 2.5", {}, ""),
    ],
)  # fmt: skip
def test_a_site_decides_what_such_noise_is_worth_to_it(
    nodes: Nodes, tmp_path: Path, policy: str | None, more: dict[str, Any], message: str
) -> None:
    node = nodes.deployed("east")
    if policy is not None:
        (tmp_path / "policy.toml").write_text(policy, encoding="utf-8")
        node |= {
            "state-path": str(tmp_path / "state"),
            "policy-path": str(tmp_path / "policy.toml"),
        }
    told = nodes.member(node, **NOISY | {"data__partition": "own"} | more)
    assert (message in told["error"]) if message else "error" not in told


def test_a_policy_counts_the_positions_of_all_runs(nodes: Nodes, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("require-unit = 'position'\nmax-epsilon = 5.0", encoding="utf-8")
    node = parse_node(
        nodes.deployed("east", state_path=str(tmp_path / "state"), policy_path=str(policy))
    )
    config = parse(nodes.flat(**NOISY))
    account = SiteAccount(config, node, {"run": "a-run"}, site="east", rows=8, base="c0ffee")
    affordable = 0
    vectors = 2 * passes(config, 8, 1, 2)
    while epsilon_of_vectors(5.0, 1e-5, (affordable + 1) * vectors) <= 5.0:
        affordable += 1
    for at in range(affordable):
        account.charge(releases(config, 8, [at + 1], 2))
    with pytest.raises(PolicyError, match="was spent before"):
        account.charge(releases(config, 8, [affordable + 1], 2))
    assert affordable > 0
    # What stands beside the vectors is in the ledger, and leaves them their own account.
    events = Ledger(tmp_path / "state" / "ledger.jsonl").events()
    assert Counter(event.unit for event in events) == {
        "position": 2 * affordable, "record": 2 * affordable
    }  # fmt: skip
