"""The streams of whole runs: who has a key, who scores when, and what a site without one costs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from flower_app import compose
from flower_app.config import parse
from flower_app.node import parse_node
from flower_app.split.site import certificate, connected
from flower_app.split.stream import Incoming, StreamError
from flower_app.worker import Worker
from models.split.link import FrameLink
from models.split.messages import Kind
from models.split.messages import Message as Message_
from models.split.site import SplitPayload
from models.split.step import SplitError
from strategies.flower import RoundError
from tests.fakes import Answer
from tests.flower_app.nodes import Nodes
from tests.flower_app.runs import Killed, bytes_below, rows, run, simulate
from tests.flower_app.split.test_stream import of_no_known_version

SPLIT: dict[str, Any] = {"payload__kind": "split", "split__wire": "fp32"}


def test_without_a_single_key_the_round_says_who_answered_and_who_did_not(nodes: Nodes) -> None:
    keys: dict[str, Any] = SPLIT | {"split__schedule": "hierarchical", "split__replicas": 2}
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    for node, site in grid.sites.items():
        grid.sites[node] = partial(_without_a_key, site)
    with pytest.raises(
        RoundError, match=r"Expected at least \d of 3 sites to answer well in round"
    ):
        run(nodes, grid, **keys, run__output_dir=str(nodes.folder / "keyless"))


def _without_a_key(site: Any, question: Message) -> Iterable[Answer]:
    for answer in site(question):
        if question.metadata.message_type == "query.split_key":
            answer.report = {"error": "no key here"}
        yield answer


@pytest.mark.parametrize("wrong", ["version", "twin"])
def test_a_certificate_that_cannot_be_used_fails_its_own_site(nodes: Nodes, wrong: str) -> None:
    keys = SPLIT | {"run__rounds": 1, "strategy__min_sites": 2, "run__quorum": 0.5}
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    seen: list[bytes] = []

    def spoiling(site: Any, question: Message) -> Iterable[Answer]:
        for answer in site(question):
            if question.metadata.message_type == "query.split_key":
                assert answer.report and isinstance(answer.report["certificate"], bytes)
                seen.append(answer.report["certificate"])
                if wrong == "version" and question.metadata.dst_node_id == 3:
                    answer.report["certificate"] = of_no_known_version(seen[-1])
                elif wrong == "twin" and len(seen) > 1:
                    answer.report["certificate"] = seen[0]
            yield answer

    for node, site in grid.sites.items():
        grid.sites[node] = partial(spoiling, site)
    if wrong == "twin":  # two of them have that of the third: only that one has a stream
        keys |= {"run__quorum": 0.3, "strategy__min_sites": 1}
    folder = run(nodes, grid, **keys, run__output_dir=str(nodes.folder / wrong))
    status = [row["status"] for row in rows(folder, "site")]
    assert sorted(status) == (
        ["failed", "ok", "ok"] if wrong == "version" else ["failed"] * 2 + ["ok"]
    )


@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_scores_alone_are_asked_of_sites_that_have_a_stream(nodes: Nodes, noise: float) -> None:
    """Where only some train, all are scored before the first round, and at the end."""
    keys: dict[str, Any] = SPLIT | {"strategy__fraction": 0.4, "run__rounds": 1}
    if noise:
        keys |= {
            "split__noise": noise, "split__clip_norm": 0.5, "split__clip_gradient": 0.01,
            "privacy__noise_source": "seeded",
        }  # fmt: skip
    folder, grid = simulate(nodes, "few", keys)
    assert len(rows(folder, "site")) == 2
    evaluations = rows(folder, "evaluation")
    assert [row["round"] for row in evaluations] == [0, 1]
    worker, config = Worker(), parse(nodes.flat(**keys))
    sites = [worker.site(config, parse_node(nodes.simulated(at))) for at in range(3)]
    tokens = sum(batch.counted for site in sites for batch in site.held_out)
    assert [row["eval_tokens"] for row in evaluations] == [tokens, tokens]
    kinds = [q.metadata.message_type for q in grid.questions if q.metadata.group_id != "roll-call"]
    assert kinds == ["query.split_key"] * 3 + ["evaluate"] * 3 + ["train"] * 2 + ["evaluate"] * 3


def test_a_server_killed_after_the_last_round_still_scores_it(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = simulate(nodes, "reference", SPLIT)
    keys = SPLIT | {"run__output_dir": str(nodes.folder / "killed")}
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    push = grid.push_messages

    def dying(messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        if asked[0].metadata.message_type == "evaluate":
            raise Killed
        return push(asked)

    monkeypatch.setattr(grid, "push_messages", dying)
    with pytest.raises(Killed):
        run(nodes, grid, **keys)
    nodes.states.clear()  # another run, for Flower
    again = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    folder = run(nodes, again, **keys, run__resume="latest")
    last, expected = rows(folder, "evaluation")[-1], rows(reference, "evaluation")[-1]
    assert (last["round"], last["loss"]) == (expected["round"], expected["loss"])
    assert bytes_below(folder) == bytes_below(reference)


def test_a_site_without_a_key_is_charged_nothing(nodes: Nodes) -> None:
    keys: dict[str, Any] = SPLIT | {
        "split__noise": 5.0, "split__clip_norm": 0.5, "split__clip_gradient": 0.01,
        "privacy__noise_source": "seeded",
    }  # fmt: skip
    plan = {"split-address": "127.0.0.1:1", "split-certificate": "of the server"}
    told = nodes.evaluate(nodes.simulated(0), nodes.start(**keys), plan=plan, **keys)
    _, also = nodes.train(nodes.simulated(0), plan=plan, **keys)
    for report in (told, also):
        assert "Expected a key for the stream of this run" in report["error"]
    assert not list((nodes.folder / "sites").rglob("ledger.jsonl"))


def test_sites_and_rounds_round_gradients_by_draws_of_their_own(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    start = FrameLink.__init__

    def watched(link: FrameLink, *given: Any, seed: int = 0, **more: Any) -> None:
        seeds.append(seed)
        start(link, *given, seed=seed, **more)

    monkeypatch.setattr(FrameLink, "__init__", watched)
    for _ in range(2):
        nodes.restart()
        simulate(nodes, f"run-{len(seeds)}", SPLIT | {"split__wire": "int8"})
    training = seeds[: len(seeds) // 2][:6]
    assert len(set(training)) == 6 and seeds[: len(seeds) // 2] == seeds[len(seeds) // 2 :]


def test_a_stream_that_comes_after_its_round_is_not_let_into_the_next(nodes: Nodes) -> None:
    config = parse(nodes.flat(**SPLIT))
    base = compose.load_base(config)
    payload = compose.attach(config, base)
    server = compose.split_server(config, base, 3, "")
    assert server is not None and isinstance(payload, SplitPayload)
    state = RecordDict()
    public = bytes(certificate(config, state)["certificate"])

    def score(round_: int) -> Tensor:
        plan = server.plan | {"round": round_}
        source = compose.noise_source(config, "split", "north", round_, "training")
        with connected(config, payload, plan, state, source, "north") as link:
            assert link is not None
            asked = link.score(1, torch.ones(1, 3, 32), torch.ones(1, 3).long())
            return asked.result(timeout=20)

    with server:
        assert not server.admit(["north"], lambda *_: {"north": {"certificate": public}})
        server.begin(2, ["north"])
        with pytest.raises(StreamError, match="The server ended the stream"):
            score(1)
        assert score(2).shape == (1, 3, 32)


def test_scores_between_rounds_end_with_a_pause_or_with_the_next_round(nodes: Nodes) -> None:
    config = parse(nodes.flat(**SPLIT, split__stall_s=0.2))
    base = compose.load_base(config)
    compose.attach(config, base)
    server = compose.split_server(config, base, 3, "")
    assert server is not None
    asked: SimpleQueue[bytes | None] = SimpleQueue()
    frame = Message_(Kind.SCORE, 1, torch.ones(1, 3, 32), torch.ones(1, 3).long()).encode("fp32")
    with server:
        silent = server._serve("east", Incoming(iter(asked.get, None), "0"))
        asked.put(frame)
        assert next(silent)
        with pytest.raises(SplitError, match=r"a word within split.stall-s=0.2"):
            next(silent)
        asked = SimpleQueue()
        left_over = server._serve("east", Incoming(iter(asked.get, None), "0"))
        asked.put(frame)
        assert next(left_over)
        server.begin(1, ["north"])
        asked.put(frame)
        with pytest.raises(SplitError, match="before the next round, but it has begun"):
            next(left_over)
        server.finish()
        assert not server._scoring and not server._middle.training
