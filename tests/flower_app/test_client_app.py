"""The ClientApp's answers, in process: the same in a simulation and at a deployed site."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from flower_app import client_app
from flower_app.recorder import read_score
from flower_app.roster import Roster
from models.base import digest_of
from models.section import ConfigError
from tests.fakes import Answer, FakeGrid, at_the_server
from tests.flower_app.nodes import NAMES, Nodes, raw, site_rows, write_rows


def test_roll_call_of_a_partition(nodes: Nodes) -> None:
    members = [nodes.member(nodes.simulated(at)) for at in range(3)]
    assert [member["site"] for member in members] == list(NAMES)
    assert [member["rows"] + member["held-out"] for member in members] == [14, 18, 22]
    for member in members:
        assert member["rows"] > 0 and member["held-out"] > 0
        assert member["base"] == digest_of(nodes.model)
        assert (member["simulated"], member["partitions"]) == (True, 3)
        assert re.fullmatch(r"0 rows cut to train.max-length, 0 without .*", member["notes"])
        assert re.search(r"flwr \d.*torch \d.*transformers \d.*peft \d", member["versions"])


def test_roll_call_of_a_deployed_site(nodes: Nodes) -> None:
    simulated = nodes.member(nodes.simulated(1))
    nodes.restart()
    member = nodes.member(nodes.deployed("north"))
    assert (member.pop("simulated"), member.pop("partitions")) == (False, 0)
    assert member == {k: v for k, v in simulated.items() if k not in ("simulated", "partitions")}
    assert not any(str(nodes.folder) in str(value) for value in member.values())


def test_a_training_reply_has_the_delta_and_a_report(nodes: Nodes) -> None:
    start = nodes.start()
    delta, report = nodes.train(nodes.simulated(0), start=start)
    member = nodes.member(nodes.simulated(0))
    assert list(delta) == list(start)
    assert {name: t.shape for name, t in delta.items()} == {n: t.shape for n, t in start.items()}
    assert sum(float(tensor.norm()) for tensor in delta.values()) > 0
    assert (report["round"], report["layout"], report["steps"]) == (1, "the-layout", 2)
    assert report["num-examples"] == report["examples"] == member["rows"]
    assert 0 < report["useful_tokens"] <= report["tokens"]
    assert math.isfinite(report["train_loss"])
    assert all(report[key] >= 0 for key in ("load_s", "train_s", "eval_s"))
    before, after = read_score("before", report), read_score("after", report)
    assert before.rows == after.rows == member["held-out"]
    assert before.counted == after.counted > 0
    assert before.loss != after.loss
    assert not any(str(nodes.folder) in str(value) for value in report.values())


def test_scores_of_a_reply_are_those_of_evaluation(nodes: Nodes) -> None:
    node, start = nodes.simulated(2), nodes.start()
    delta, report = nodes.train(node, start=start)
    end = {name: tensor + delta[name] for name, tensor in start.items()}
    for name, arrays in {"before": start, "after": end}.items():
        content = nodes.ask("evaluate", node, arrays)
        assert not content.array_records
        found = read_score("before", dict(content.config_records["report"]))
        expected = read_score(name, report)
        assert (found.counted, found.rows) == (expected.counted, expected.rows)
        assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)


def test_scoring_after_training_can_be_left_out(nodes: Nodes) -> None:
    _, report = nodes.train(nodes.simulated(0), train__score_after=False)
    assert read_score("after", report).counted == 0
    assert read_score("before", report).counted > 0


def test_the_base_model_is_read_once_for_all_messages_and_sites(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = nodes.start()
    nodes.member(nodes.simulated(0))
    module = client_app._WORKER._payload
    monkeypatch.setattr("flower_app.compose.load_base", lambda *_: pytest.fail("read again"))
    for round_ in (1, 2):
        for partition in range(3):
            _, report = nodes.train(nodes.simulated(partition), round_, start)
            assert report["base_reads"] == 1
    assert client_app._WORKER._payload is module


def test_the_payload_of_the_last_message_leaves_no_trace(nodes: Nodes) -> None:
    start = nodes.start()
    alone, _ = nodes.train(nodes.simulated(1), 2, start)
    nodes.restart()
    nodes.train(nodes.simulated(0), 1, start)
    nodes.train(nodes.simulated(1), 1, {name: tensor + 1 for name, tensor in start.items()})
    after, _ = nodes.train(nodes.simulated(1), 2, start)
    assert raw(alone) == raw(after)


def test_rounds_go_on_in_the_rows(nodes: Nodes) -> None:
    start = nodes.start()
    one, two = (nodes.train(nodes.simulated(1), round_, start)[0] for round_ in (1, 2))
    assert raw(one) != raw(two)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"payload__dropout": 0.2},
        {"payload__kind": "soft-prompt", "payload__init": "text", "payload__init_text": "the cat"},
        {"payload__kind": "full", "train__epochs": 1.0, "train__steps": 0},
        {"train__packing": "off", "train__prox_mu": 0.1, "train__grad_accumulation": 2},
    ],
    ids=lambda keys: ",".join(keys) or "default",
)
def test_a_deployed_site_answers_as_its_simulation_does(nodes: Nodes, keys: dict[str, Any]) -> None:
    """The server need not know where the sites keep their models and rows."""
    start = nodes.start(**keys)
    simulated = [nodes.train(nodes.simulated(at), 2, start, **keys) for at in range(3)]
    nodes.keys |= {"model.name": "owner/model-of-the-server", "data.source": "/at/the/server"}
    for at, site in enumerate(NAMES):
        nodes.restart()
        delta, report = nodes.train(nodes.deployed(site), 2, start, **keys)
        assert raw(delta) == raw(simulated[at][0])
        same = ("num-examples", "train_loss", "steps", "tokens", "before-loss-sum", "after-counted")
        assert [report[key] for key in same] == [simulated[at][1][key] for key in same]


def test_two_deployed_sites_in_one_process_do_not_mix(nodes: Nodes) -> None:
    start = nodes.start()
    apart = []
    for site in NAMES[:2]:
        nodes.restart()
        apart.append(raw(nodes.train(nodes.deployed(site), 1, start)[0]))
    nodes.restart()
    together = [raw(nodes.train(nodes.deployed(site), 1, start)[0]) for site in NAMES[:2] * 2]
    assert together == apart * 2
    assert client_app._WORKER.bases.reads == 1


def test_held_out_rows_of_their_own(nodes: Nodes) -> None:
    held = site_rows("north", 20)[-6:]
    path = write_rows(nodes.folder / "held.jsonl", held)
    member = nodes.member(nodes.deployed("north", eval_path=path))
    assert (member["held-out"], member["rows"]) == (6, 14)
    assert member["notes"].endswith("4 also held out")


def baseline(nodes: Nodes, site: str, partition: int = 0, **keys: Any) -> dict[str, Any]:
    content = nodes.ask(
        "train.baseline", nodes.simulated(partition), nodes.start(**keys), {"site": site}, **keys
    )
    return dict(content.config_records["report"])


def test_baselines_train_one_site_or_all(nodes: Nodes) -> None:
    alone = baseline(nodes, "north")
    pooled = baseline(nodes, "")
    held_out = [nodes.member(nodes.simulated(at))["held-out"] for at in range(3)]
    assert (alone["site"], pooled["site"]) == ("north", "")
    assert alone["all-rows"] == pooled["all-rows"] == sum(held_out)
    assert alone["own-rows"] == held_out[1]
    assert "own-rows" not in pooled
    assert alone["all-loss-sum"] != pooled["all-loss-sum"]
    nodes.restart()
    assert baseline(nodes, "north", partition=2) == alone


def test_a_baseline_alone_is_training_without_the_others(nodes: Nodes) -> None:
    """Two rounds of the site itself, with nothing aggregated in between, end in the same place."""
    node, payload = nodes.simulated(1), nodes.start()
    for round_ in (1, 2):
        delta, report = nodes.train(node, round_, payload)
        payload = {name: tensor + delta[name] for name, tensor in payload.items()}
    own = read_score("own", baseline(nodes, "north"))
    assert own.loss == pytest.approx(read_score("after", report).loss, rel=1e-4)


def test_a_deployed_site_trains_no_baseline(nodes: Nodes) -> None:
    content = nodes.ask("train.baseline", nodes.deployed("north"), nodes.start(), {"site": "north"})
    assert re.search(
        r"Expected a simulation, got a deployed site",
        str(content.config_records["report"]["error"]),
    )


def test_classes_are_trained_and_scored(nodes: Nodes, tiny_models: Mapping[str, Path]) -> None:
    keys = {
        "model__name": str(tiny_models["bert"]),
        "model__task": "classification",
        "data__format": "classification",
    }
    start = nodes.start(**keys)
    delta, report = nodes.train(nodes.simulated(1), 1, start, **keys)
    assert any("classifier" in name and tensor.any() for name, tensor in delta.items())
    after = read_score("after", report)
    assert after.rows == after.counted > 0
    assert 0 <= after.metric("accuracy") <= 1


# What can be wrong at a site, and what its operator reads.


def refused(nodes: Nodes, node: Mapping[str, Any], **keys: Any) -> str:
    """The reason that the roll call gives, which training gives too."""
    error = nodes.member(node, **keys).get("error")
    assert isinstance(error, str), "the site was taken"
    assert "Traceback" not in error
    content = nodes.ask("train", node, {"w": torch.zeros(1)}, {"round": 1, "layout": ""}, **keys)
    assert content.config_records["report"]["error"] == error
    assert not content.array_records
    return error


def test_a_missing_data_path(nodes: Nodes) -> None:
    gone = str(nodes.folder / "gone.jsonl")
    error = refused(nodes, nodes.deployed("north", data_path=gone))
    assert re.match(
        rf"Expected a file or folder at '{gone}', found nothing .*check the path", error
    )


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file(nodes: Nodes, content: bytes) -> None:
    path = nodes.folder / "empty.jsonl"
    path.write_bytes(content)
    error = refused(nodes, nodes.deployed("north", data_path=str(path)))
    assert re.match(r"Expected rows in '.*empty\.jsonl', found none; give it at least two", error)


def test_a_site_with_one_row_trains_without_held_out_rows_or_is_refused(nodes: Nodes) -> None:
    outcomes = set()
    for at in range(12):
        path = write_rows(nodes.folder / f"one{at}.jsonl", [{"text": f"only row {at}"}])
        node = nodes.deployed(f"lone{at}", data_path=path)
        member = nodes.member(node, data__eval_fraction=0.5)
        if error := member.get("error"):
            outcomes.add("refused")
            assert re.match(
                rf"Expected rows to train on at site 'lone{at}', got 1, all of which "
                r"data.eval-fraction=0.5 holds out; lower it or add rows", error,
            )  # fmt: skip
            continue
        outcomes.add("trains")
        assert (member["rows"], member["held-out"]) == (1, 0)
        delta, report = nodes.train(node, data__eval_fraction=0.5)
        assert any(tensor.any() for tensor in delta.values())
        assert read_score("after", report).counted == 0
        assert math.isnan(read_score("after", report).loss)
    assert outcomes == {"trains", "refused"}


def test_a_column_that_is_not_there(nodes: Nodes) -> None:
    for node in (nodes.deployed("north"), nodes.simulated(0)):
        error = refused(nodes, node, data__text_column="body")
        assert re.match(
            r"Expected a column 'body' in .*, got the columns label, site, text; set the data",
            error,
        )
    error = refused(nodes, nodes.simulated(0), data__partition_column="clinic")
    assert re.match(r"Expected a column 'clinic' .*got the columns label, site, text", error)


def test_a_file_that_is_not_utf8(nodes: Nodes) -> None:
    path = nodes.folder / "latin.jsonl"
    path.write_bytes('{"text": "Grüße"}\n'.encode("latin-1"))
    error = refused(nodes, nodes.deployed("north", data_path=str(path)))
    assert re.match(r"Expected UTF-8 in .*latin\.jsonl, got the byte 0xfc at .*iconv", error)


def test_a_model_folder_that_is_not_one(nodes: Nodes) -> None:
    error = refused(nodes, nodes.deployed("north", model_path=str(nodes.folder)))
    assert re.match(r"Expected a model folder with a config\.json, got '.*'; save the model", error)
    gone = str(nodes.folder / "no-model")
    error = refused(nodes, nodes.deployed("north", model_path=gone))
    assert re.match(rf"Expected a model folder with a config\.json, got '{gone}'", error)


def test_another_base_model_than_the_servers(nodes: Nodes, tiny_models: Mapping[str, Path]) -> None:
    def site(question: Message) -> Iterable[Answer]:
        other = nodes.deployed("north", model_path=str(tiny_models["gpt2"]))
        return [Answer(report=nodes.member(other), record="member")]

    roster = Roster(digest_of(nodes.model), timeout=1.0)
    ours, theirs = (digest_of(tiny_models[name])[:12] for name in ("llama", "gpt2"))
    message = rf"'north' to hold the server's base model {ours}, got {theirs}; give it the same"
    with at_the_server(), pytest.raises(ConfigError, match=message):
        roster.assemble(FakeGrid({7: site}), 1, timeout=0.0)


def test_arrays_of_another_payload(nodes: Nodes) -> None:
    _, report = nodes.train(nodes.simulated(0), start={"w": torch.zeros(3)})
    assert re.match(r"Expected tensor '.*lora_A\.weight', which is missing", report["error"])
    assert nodes.train(nodes.simulated(0))[1]["steps"] == 2  # the process goes on


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one(nodes: Nodes, rank: int) -> None:
    error = refused(nodes, nodes.simulated(0), payload__rank=rank)
    assert re.match(
        rf"Expected payload\.rank .*greater than or equal to 1, got {rank}; change", error
    )


def test_unknown_names_are_explained_with_the_choices(nodes: Nodes) -> None:
    error = refused(nodes, nodes.simulated(0), payload__kind="lorra")
    assert re.match(r"Unknown payload\.kind 'lorra'\. Did you mean 'lora'\? Choices: .*", error)
    error = refused(nodes, nodes.simulated(0), train__stepps=3)
    assert re.match(r"Unknown configuration key 'train\.stepps'.* 'train\.steps'\?", error)


def test_unknown_node_config_keys(nodes: Nodes) -> None:
    error = refused(nodes, nodes.deployed("north", data_pth="/x"))
    assert re.match(r"Expected a node config of .*data-path.*model-path, but data-pth: ", error)


@pytest.mark.parametrize("missing", ["site", "data-path"])
def test_a_node_without_a_name_or_rows(nodes: Nodes, missing: str) -> None:
    node = {key: value for key, value in nodes.deployed("north").items() if key != missing}
    error = refused(nodes, node)
    assert re.match(r"Expected 'site' and 'data-path' in this node's config, got .*--node", error)


@pytest.mark.parametrize("partition", [3, 10])
def test_a_partition_beyond_the_names(nodes: Nodes, partition: int) -> None:
    error = refused(nodes, nodes.simulated(partition))
    assert re.match(
        rf"Expected 'partition-id' below 'num-partitions' .*got {partition} of 3; count", error
    )


def test_more_partitions_than_sites_in_the_data(nodes: Nodes) -> None:
    error = refused(nodes, nodes.simulated(0, of=4))
    assert re.match(r"Expected .*4.*got 3", error)


def test_a_length_beyond_the_models_context(nodes: Nodes) -> None:
    error = refused(nodes, nodes.simulated(0), train__max_length=65)
    assert re.match(
        r"Expected train\.max-length of at most 64, the model's context.*65; low", error
    )
    assert nodes.member(nodes.simulated(0), train__max_length=64)["site"] == "east"


@pytest.mark.parametrize("kind", ["soft-prompt", "prefix", "p-tuning"])
def test_virtual_tokens_take_room_in_the_context(nodes: Nodes, kind: str) -> None:
    keys = {"payload__kind": kind, "payload__num_virtual_tokens": 10}
    error = refused(nodes, nodes.simulated(0), train__max_length=55, **keys)
    assert re.match(
        r"Expected train\.max-length of at most 54, the model's context of 64 beside 10 virtual "
        r"tokens, got 55; lower it", error,
    )  # fmt: skip
    assert nodes.member(nodes.simulated(0), train__max_length=54, **keys)["site"] == "east"


def test_an_adapter_takes_no_room_in_the_context(nodes: Nodes) -> None:
    keys = {"payload__kind": "adapter", "train__max_length": 64}
    assert nodes.member(nodes.simulated(0), **keys)["site"] == "east"


INSTRUCT = {"data__format": "instruct", "data__eval_fraction": 0.0, "train__max_length": 16}


def test_rows_longer_than_the_context_are_cut_and_counted(nodes: Nodes) -> None:
    rows = [
        {"instruction": "the cat " * 30, "output": "sat"},
        {"instruction": "the dog", "output": "ran"},
        {"instruction": "the mat", "output": "one two three four five six seven " * 5},
    ]
    path = write_rows(nodes.folder / "long.jsonl", rows)
    node = nodes.deployed("north", data_path=path)
    member = nodes.member(node, **INSTRUCT)
    assert member["rows"] == 3
    assert member["notes"].startswith("2 rows cut to train.max-length, 0 without a label left")
    _, report = nodes.train(node, **INSTRUCT)
    assert math.isfinite(report["train_loss"])


def test_long_documents_are_cut_into_pieces_of_which_nothing_is_lost(nodes: Nodes) -> None:
    path = write_rows(nodes.folder / "long.jsonl", [{"text": "the cat sat on the mat " * 40}])
    node = nodes.deployed("north", data_path=path)
    keys = {"data__eval_fraction": 0.0, "train__steps": 0, "train__epochs": 1.0}
    _, short = nodes.train(node, **keys, train__max_length=16)
    _, long = nodes.train(node, **keys, train__max_length=64)
    assert nodes.member(node, **keys, train__max_length=16)["notes"].startswith("0 rows cut")
    pieces = {n: r["useful_tokens"] for n, r in (("short", short), ("long", long))}
    assert pieces["short"] > pieces["long"] > 200  # each further piece repeats one token
    assert short["steps"] > long["steps"] >= 1


def test_rows_without_an_answer_are_dropped_and_counted(nodes: Nodes) -> None:
    rows = [{"instruction": "the cat", "output": ""}, {"instruction": "the dog", "output": "ran"}]
    path = write_rows(nodes.folder / "blank.jsonl", rows)
    node = nodes.deployed("north", data_path=path)
    assert "1 without a label left" in nodes.member(node, **INSTRUCT)["notes"]
    path = write_rows(nodes.folder / "none.jsonl", rows[:1])
    error = refused(nodes, nodes.deployed("north", data_path=path), **INSTRUCT)
    assert re.match(r"Expected at least one example to train on, got none; check", error)


def test_choices_whose_prompt_does_not_fit_are_cut(nodes: Nodes) -> None:
    rows = [
        {"instruction": "the cat " * at, "choices": ["sat", "ran"], "label": at % 2}
        for at in range(1, 20)
    ]
    path = write_rows(nodes.folder / "choices.jsonl", rows)
    node = nodes.deployed("north", data_path=path)
    keys = {"data__format": "choice", "train__max_length": 16}
    member = nodes.member(node, **keys)
    assert int(member["notes"].split()[0]) > 0
    _, report = nodes.train(node, **keys)
    after = read_score("after", report)
    assert after.rows == member["held-out"] > 0
    assert 0 <= after.correct <= after.rows


def test_a_class_that_the_model_has_no_score_for(nodes: Nodes) -> None:
    keys = {"model__task": "classification", "data__format": "classification"}
    for more in ({"model__num_labels": 2}, {"data__labels": "0,1"}):
        error = refused(nodes, nodes.deployed("north"), **keys, **more)
        assert re.search(r"class.* got (int ')?2", error)
    taken = nodes.member(nodes.deployed("north"), **keys, model__num_labels=3)
    assert taken["rows"] > 0


def test_classes_that_nobody_names(nodes: Nodes) -> None:
    keys = {"model__task": "classification", "data__format": "classification"}
    error = refused(nodes, nodes.deployed("north"), **keys, data__partition="own")
    assert re.match(r"Expected model\.num-labels or data\.labels for a classification", error)


def test_training_that_diverges_is_a_reason_not_a_crash(nodes: Nodes) -> None:
    _, report = nodes.train(
        nodes.simulated(0), train__learning_rate=1e30, train__optimizer="sgd",
        train__max_grad_norm=0.0, train__steps=4,
    )  # fmt: skip
    assert re.match(r"Expected a finite training loss, got .*; lower train\.learn", report["error"])
    assert nodes.train(nodes.simulated(0))[1]["steps"] == 2
