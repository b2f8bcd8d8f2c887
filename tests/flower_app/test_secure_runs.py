"""Secure aggregation in whole runs: the same model, and nothing of one site at the server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import config_record_from_proto, config_record_to_proto
from safetensors.torch import load_file

from flower_app.siteround import SiteRound
from models.section import ConfigError
from privacy.accounting import spent
from privacy.ledger import Ledger
from strategies.flower import RoundError
from strategies.messages import arrays_of
from tests.fakes import Answer, FakeGrid
from tests.flower_app.nodes import NAMES, Nodes
from tests.flower_app.runs import Shared, bytes_below, deploy, rows, run, simulate
from tests.nodekeys import write_keys

MASKS: dict[str, Any] = {"secure__aggregation": "masks"}


def payload(folder: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's payload."""
    tensors = load_file(max((folder / "checkpoint").glob("round-*.safetensors")))
    return {name: tensor for name, tensor in tensors.items() if name.startswith("payload/")}


def assert_close(one: Path, other: Path, step: float) -> None:
    ours, theirs = payload(one), payload(other)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=step)


LOW: dict[str, Any] = {
    "secure__bits": 16, "secure__range": 0.1, "secure__rounding": "nearest", "run__rounds": 1,
    "strategy__weighting": "uniform", "strategy__server_optimizer": "momentum",
}  # fmt: skip


@pytest.mark.parametrize(("settings", "step"), [({}, 1e-6), (LOW, 1e-4)])
def test_a_secure_run_equals_a_plain_one(
    nodes: Nodes, shared: Shared, settings: Mapping[str, Any], step: float
) -> None:
    plain = {key: value for key, value in settings.items() if not key.startswith("secure")}
    reference, _ = simulate(nodes, "plain", plain)
    folder, grid = shared.simulate(MASKS | dict(settings))
    assert_close(folder, reference, 2 * step)
    moved = payload(folder)
    assert any(bool(t.abs().sum() > 0) for name, t in moved.items() if "lora_B" in name)
    kinds = [q.metadata.message_type for q in grid.questions if q.metadata.group_id != "roll-call"]
    steps = ["query.secure_advertise", "query.secure_share", "train", "query.secure_confirm"]
    expected = [kind for kind in [*steps, "query.secure_unmask"] for _ in NAMES]
    assert kinds == expected * settings.get("run__rounds", 2) + ["evaluate"] * 3


def test_the_server_sees_no_update_and_sites_keep_no_secret(nodes: Nodes) -> None:
    seen: list[Message] = []

    class Grid(FakeGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(super().pull_messages(message_ids))
            seen.extend(found)
            return found

    keys = MASKS | {"run__output_dir": str(nodes.folder / "runs")}
    inner = Grid(nodes.grid(*map(nodes.simulated, range(3)), **keys).sites)
    folder = run(nodes, inner, **keys)
    replies = [reply for reply in seen if reply.metadata.message_type == "train"]
    assert len(replies) == 6
    assert all(set(arrays_of(reply.content)) == {"masked"} for reply in replies)
    kept = [file for file in (folder / "sites").rglob("*") if file.is_file()]
    assert kept == []
    # What the run says that it sent and got is what all these messages held.
    ours = [q for q in inner.questions if q.metadata.group_id != "roll-call"]
    told = rows(folder, "round")
    assert sum(row["bytes_down"] for row in told) == held(ours, "parcel")
    assert sum(row["bytes_up"] for row in told) == held(seen, "answer")


def held(messages: Iterable[Message], record: str) -> int:
    """Bytes of a record, and of the arrays of training, in messages that do not evaluate."""
    total = 0
    for message in messages:
        if message.metadata.message_type == "evaluate":
            continue
        parcel = dict(message.content.config_records.get(record, {}))
        cells = [c for v in parcel.values() for c in (v if isinstance(v, list) else [v])]
        total += sum(len(c) if isinstance(c, bytes | str) else 8 for c in cells)
        total += sum(len(a.data) for a in arrays_of(message.content).values())
    return total


def test_the_same_seed_gives_the_same_bytes(nodes: Nodes, shared: Shared) -> None:
    """Masks are fresh each time, and leave no trace in the sum."""
    one, _ = shared.simulate(MASKS)
    other, _ = simulate(nodes, "other", MASKS)
    assert bytes_below(one / "checkpoint") == bytes_below(other / "checkpoint")


def test_lists_of_records_survive_flower_s_own_form(nodes: Nodes) -> None:
    """An empty list of dropouts is one, also after Flower has written it down."""
    record = ConfigRecord({"active": ["a", "b"], "dropped": [], "signatures": [b"x", b""]})
    assert config_record_from_proto(config_record_to_proto(record)) == record


def six(nodes: Nodes, silent: Mapping[str, frozenset[int]], **keys: Any) -> tuple[Path, FakeGrid]:
    """A simulation of six sites, of which some do not answer certain messages."""
    keys = MASKS | {"data__partition": "iid"} | keys
    keys |= {"run__output_dir": str(nodes.folder / "runs"), "secure__stage_s": 0.05}
    keys |= {"run__deadline_s": 0.05}
    grid = nodes.grid(*(nodes.simulated(at, of=6) for at in range(6)), **keys)

    def muted(node: int, site: Any) -> Any:
        def answer(question: Message) -> Iterator[Answer]:
            if node not in silent.get(question.metadata.message_type, ()):
                yield from site(question)

        return answer

    grid.sites = {node: muted(node, site) for node, site in grid.sites.items()}
    return run(nodes, grid, **keys), grid


def statuses(folder: Path) -> dict[str, str]:
    return {row["site"]: row["status"] for row in rows(folder, "site") if row["round"] == 1}


@pytest.mark.parametrize("step", ["query.secure_share", "train", "query.secure_unmask"])
def test_a_site_that_drops_out_on_the_way(nodes: Nodes, step: str) -> None:
    folder, grid = six(nodes, {step: frozenset({2})}, run__rounds=1)
    assert list(statuses(folder).values()).count("ok") == (
        6 if step == "query.secure_unmask" else 5
    )
    assert len(grid.asked("train")) == (5 if step == "query.secure_share" else 6)
    assert any(bool(t.abs().sum() > 0) for n, t in payload(folder).items() if "lora_B" in n)


def spoil(nodes: Nodes, site: str) -> None:
    """Let the training of one site end with values that are not finite."""
    finish = SiteRound.finish

    def finished(work: SiteRound) -> dict[str, torch.Tensor]:
        delta = finish(work)
        if work._site.name == site:
            at = {0: float("nan"), 1: float("inf"), 2: -float("inf")}
            for tensor in delta.values():
                for place, value in at.items():
                    tensor.view(-1)[place] = value
        return delta

    nodes.monkeypatch.setattr(SiteRound, "finish", finished)


def assert_left_out(nodes: Nodes, **keys: Any) -> None:
    """A site whose update is not finite says so, and the others' sum is what it is without it."""
    without, _ = six(nodes, {"train": frozenset({2})}, run__rounds=1, **keys)
    (site,) = [name for name, status in statuses(without).items() if status != "ok"]
    spoil(nodes, site)
    folder, _ = six(nodes, {}, run__rounds=1, **keys)
    (told,) = [row for row in rows(folder, "site") if row["status"] != "ok" and row["round"] == 1]
    assert (told["site"], told["status"]) == (site, "failed")
    assert re.search(r"Expected a finite update, got one with \d+ of \d+ val", told["reason"])
    assert bytes_below(folder / "adapter") == bytes_below(without / "adapter")


def test_an_update_that_is_not_finite_gets_into_no_sum(nodes: Nodes) -> None:
    assert_left_out(nodes)


def test_too_few_sites_keep_the_sum_closed(nodes: Nodes) -> None:
    with pytest.raises(RoundError, match=r"at least 5 of 6 sites of group 1 that sent mas"):
        six(nodes, {"train": frozenset({2, 3})}, run__rounds=1)


def test_a_group_that_fails_does_not_end_the_round(nodes: Nodes) -> None:
    keys = {"secure__groups": 2, "strategy__rule": "mean", "run__rounds": 1}
    folder, _ = six(nodes, {"train": frozenset({2})}, **keys)
    assert sorted(statuses(folder).values()) == ["failed"] * 2 + ["missing"] + ["ok"] * 3


def test_a_median_of_sums(nodes: Nodes) -> None:
    keys = {"secure__groups": 2, "strategy__rule": "median", "run__rounds": 1}
    folder, _ = six(nodes, {}, **keys)
    assert any(bool(t.abs().sum() > 0) for n, t in payload(folder).items() if "lora_B" in n)


def deployed(nodes: Nodes, **keys: Any) -> tuple[Path, FakeGrid]:
    folder = nodes.folder / "keys"
    keys = {"run__output_dir": str(nodes.folder / "runs")} | keys
    keys |= MASKS | {"data__partition": "own", "strategy__min_sites": 3}
    configs = [
        nodes.deployed(
            name,
            state_path=str(nodes.folder / "state"),
            key_path=str(folder / f"{name}.pem"),
            peers_path=str(folder / "peers"),
        )
        for name in NAMES
    ]
    grid = nodes.grid(*configs, **keys)
    return run(nodes, grid, **keys), grid


def test_deployed_sites_with_keys_of_their_own(nodes: Nodes) -> None:
    write_keys(nodes.folder / "keys", NAMES)
    reference, _ = deploy(nodes, "plain")
    folder, _ = deployed(nodes)
    assert_close(folder, reference, 2e-6)
    assert [file for file in (nodes.folder / "state").rglob("*.json")] == []


def test_deployed_sites_add_noise_in_shares_from_their_own_generators(nodes: Nodes) -> None:
    write_keys(nodes.folder / "keys", NAMES)
    shared = {"privacy__unit": "client", "privacy__place": "distributed"}
    shared |= {"privacy__epsilon": 5.0, "privacy__clip_norm": 0.1, "run__rounds": 1}
    folder, _ = deployed(nodes, **shared, strategy__weighting="uniform")
    (event,) = Ledger(nodes.folder / "state" / "ledger.jsonl").events()[-1:]
    (row,) = rows(folder, "round")
    size = sum(tensor.numel() for tensor in payload(folder).values())
    assert (event.mechanism, event.noise_at) == ("discrete-gaussian", "sites")
    assert 4.9 < spent([event], 1e-5) <= 5.0
    expected = event.noise_multiplier * 0.1 / 3
    assert row["update_norm"] / size**0.5 == pytest.approx(expected, rel=0.1)


def test_a_key_that_is_not_pinned_is_named(nodes: Nodes) -> None:
    write_keys(nodes.folder / "keys", NAMES)
    wrong = nodes.folder / "keys" / "peers"
    (wrong / "east.pem").write_bytes((wrong / "west.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"Expected east.pem in the folder of 'peers-path'"):
        deployed(nodes, run__deadline_s=0.3)


def test_keys_are_asked_for_at_the_roll_call(nodes: Nodes) -> None:
    with pytest.raises(ConfigError, match="Expected 'key-path' in this node's config, since"):
        deploy(nodes, "secure", MASKS, run__deadline_s=0.3)


def test_a_site_sends_nothing_in_the_open(nodes: Nodes) -> None:
    """A server that asks for the update straight away gets none."""
    delta, report = nodes.train(nodes.simulated(0), **MASKS)
    assert not delta
    assert report["error"].startswith("Expected a session of secure aggregation at this site")


def advertised(
    nodes: Nodes, node: Mapping[str, Any], run: str = "a-run", **keys: Any
) -> dict[str, Any]:
    plan = ConfigRecord({"state": str(nodes.folder / "sites"), "run": "a-run"})
    terms = {"run": run, "round": 1, "group": "g", "layout": "l", "size": 3}
    content = RecordDict({"plan": plan, "parcel": ConfigRecord(terms | {"members": list(NAMES)})})
    answer = nodes.hand("query.secure_advertise", node, content, **MASKS | keys)
    return dict(answer.config_records["answer"])


def keyed(nodes: Nodes) -> dict[str, Any]:
    """A deployed site with keys, which are made here."""
    folder = nodes.folder / "keys"
    write_keys(folder, NAMES)
    return nodes.deployed(
        "east",
        state_path=str(nodes.folder / "state"),
        key_path=str(folder / "east.pem"),
        peers_path=str(folder / "peers"),
    )


NOISED: dict[str, Any] = {
    "privacy__unit": "client", "privacy__place": "distributed", "privacy__epsilon": 1.0,
    "strategy__weighting": "uniform", "data__partition": "own",
}  # fmt: skip


@pytest.mark.parametrize(
    "step", ["train", "query.secure_share", "query.secure_confirm", "query.secure_unmask"]
)
def test_keys_of_a_run_without_noise_open_no_sum_of_one_with_noise(nodes: Nodes, step: str) -> None:
    """A server that names both runs alike would have the noise charged, and left out."""
    node = keyed(nodes)
    assert "signature" in advertised(nodes, node, data__partition="own")
    if step == "train":
        told = nodes.train(node, **MASKS | NOISED)[1]
    else:
        content = RecordDict({"plan": ConfigRecord({"run": "a-run"}), "parcel": ConfigRecord()})
        (told,) = map(dict, nodes.hand(step, node, content, **MASKS | NOISED).values())
    assert "Expected a sum of this very run, with all of its settings" in told["error"]
    assert not (nodes.folder / "state" / "ledger.jsonl").exists()  # nor is anything charged


def test_keys_are_made_for_the_run_that_the_site_is_told_of(nodes: Nodes) -> None:
    node = keyed(nodes)
    told = advertised(nodes, node, run="another", data__partition="own")
    assert "Expected a sum of this very run" in told["error"] and "'another'" in told["error"]


def test_a_session_is_taken_once(nodes: Nodes) -> None:
    assert set(advertised(nodes, nodes.simulated(0))) == {
        "sealing", "masking", "magnitude", "signature",
    }  # fmt: skip
    (kept,) = (nodes.folder / "sites").rglob("session.json")
    assert kept.stat().st_mode & 0o077 == 0
    assert json.loads(kept.read_text())["step"] == "advertised"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy__rule": "median"}, r"secure\.groups=1, got strategy\.rule='median'"),
        ({"strategy__pre": "clip"}, r"strategy\.pre='clip'; set secure\.groups"),
        ({"strategy__rule": "lora-exact"}, "which needs the factors of each site; set strategy"),
        ({"attack__name": "sign-flip"}, "which rewrites updates that nobody sees"),
        (
            {
                "privacy__unit": "client",
                "privacy__noise_multiplier": 1.0,
                "strategy__weighting": "uniform",
            },
            r"place='local' or 'distributed' with secure",
        ),
        ({"secure__groups": 2}, r"Expected at least 6 sites for secure\.groups=2"),
        ({"secure__aggregation": "none", "secure__groups": 2}, r"Expected secure\.groups=1 with"),
        ({"secure__bits": 8, "secure__aggregation": "mask"}, "secure.aggregation"),
    ],
)
def test_what_cannot_be_had_is_refused(
    nodes: Nodes, settings: Mapping[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        simulate(nodes, "runs", MASKS | dict(settings))
