"""What can be wrong at a site, and what its operator and the server read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from flower_app.config import parse
from flower_app.node import parse_node
from flower_app.recorder import read_score
from flower_app.roster import Roster
from flower_app.worker import Worker
from models.base import digest_of
from models.section import ConfigError
from tests.fakes import Answer, FakeGrid, at_the_server
from tests.flower_app.nodes import Nodes, write_rows


def refused(nodes: Nodes, node: Mapping[str, Any], **keys: Any) -> str:
    """What the operator reads at the roll call and in training; the server learns no path."""
    told = nodes.member(node, **keys).get("error")
    assert isinstance(told, str), "the site was taken"
    (error,) = nodes.errors
    content = nodes.ask("train", node, {"w": torch.zeros(1)}, {"round": 1, "layout": ""}, **keys)
    assert content.config_records["report"]["error"] == told
    assert not content.array_records
    assert nodes.errors == [error, error]
    nodes.errors.clear()
    if "data-path" in node:
        assert str(nodes.folder) not in told and node["data-path"] not in told
    else:
        assert told == error
    return error


def notes(nodes: Nodes, node: Mapping[str, Any], **keys: Any) -> str:
    """What the site's own log says of its rows: how many were cut or dropped."""
    return Worker().site(parse(nodes.flat(**keys)), parse_node(node)).notes


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
        if "error" in member:
            outcomes.add("refused")
            error = nodes.errors.pop()
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


@pytest.mark.parametrize("form", ["{}/", "{}/../no-model", "~/no-model"])
def test_the_server_learns_no_path_of_a_site(nodes: Nodes, form: str) -> None:
    nodes.monkeypatch.setenv("HOME", str(nodes.folder))
    path = form.format(nodes.folder / "no-model")
    told = nodes.member(nodes.deployed("north", model_path=path))["error"]
    assert told.startswith("Expected a model folder with a config.json, got '...'; save")
    assert str(nodes.folder) in nodes.errors.pop()


def test_the_server_learns_no_row_of_a_site(nodes: Nodes) -> None:
    path = write_rows(nodes.folder / "odd.jsonl", [{"text": ["secret cell"]}])
    told = nodes.member(nodes.deployed("north", data_path=path))["error"]
    assert told == "DataError: the log at the site says what is wrong."
    assert nodes.errors.pop().startswith("Expected ")
    mixed: list[dict[str, object]] = [{"text": "t"}, {"text": {"a": "secret cell"}}]
    path = write_rows(nodes.folder / "mixed.jsonl", mixed)
    assert "secret" not in nodes.member(nodes.deployed("north", data_path=path))["error"]


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
    assert re.match(r"Expected the server's layout \w+, got \w+ at this site; use", report["error"])
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
    assert re.match(r"Expected a node config of .*data-path.*model-path.*, but data-pth: ", error)


@pytest.mark.parametrize("missing", ["site", "data-path"])
def test_a_node_without_a_name_or_rows(nodes: Nodes, missing: str) -> None:
    node = {key: value for key, value in nodes.deployed("north").items() if key != missing}
    error = refused(nodes, node)
    there = "data-path" if missing == "site" else "site"
    assert re.match(
        rf"Expected 'site' and 'data-path' in this node's config, got {there}; .*--node-con", error
    )
    nodes.errors.clear()
    assert "got neither; start" in refused(nodes, {})


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
    keys: dict[str, Any] = {"payload__kind": kind, "payload__num_virtual_tokens": 10}
    error = refused(nodes, nodes.simulated(0), train__max_length=55, **keys)
    assert re.match(
        r"Expected train\.max-length of at most 54, the model's context of 64 beside 10 virtual "
        r"tokens, got 55; lower it", error,
    )  # fmt: skip
    assert nodes.member(nodes.simulated(0), train__max_length=54, **keys)["site"] == "east"


def test_an_adapter_takes_no_room_in_the_context(nodes: Nodes) -> None:
    keys: dict[str, Any] = {"payload__kind": "adapter", "train__max_length": 64}
    assert nodes.member(nodes.simulated(0), **keys)["site"] == "east"


INSTRUCT: dict[str, Any] = {
    "data__format": "instruct",
    "data__eval_fraction": 0.0,
    "train__max_length": 16,
}


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
    assert notes(nodes, node, **INSTRUCT).startswith(
        "2 rows cut to train.max-length, 0 without a label left"
    )
    _, report = nodes.train(node, **INSTRUCT)
    assert math.isfinite(report["train_loss"])


def test_long_documents_are_cut_into_pieces_of_which_nothing_is_lost(nodes: Nodes) -> None:
    path = write_rows(nodes.folder / "long.jsonl", [{"text": "the cat sat on the mat " * 40}])
    node = nodes.deployed("north", data_path=path)
    keys: dict[str, Any] = {"data__eval_fraction": 0.0, "train__steps": 0, "train__epochs": 1.0}
    _, short = nodes.train(node, **keys, train__max_length=16)
    _, long = nodes.train(node, **keys, train__max_length=64)
    assert notes(nodes, node, **keys, train__max_length=16).startswith("0 rows cut")
    pieces = {n: r["useful_tokens"] for n, r in (("short", short), ("long", long))}
    assert pieces["short"] > pieces["long"] > 200  # each further piece repeats one token
    assert short["steps"] > long["steps"] >= 1


def test_rows_without_an_answer_are_dropped_and_counted(nodes: Nodes) -> None:
    rows = [{"instruction": "the cat", "output": ""}, {"instruction": "the dog", "output": "ran"}]
    path = write_rows(nodes.folder / "blank.jsonl", rows)
    node = nodes.deployed("north", data_path=path)
    assert "1 without a label left" in notes(nodes, node, **INSTRUCT)
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
    keys: dict[str, Any] = {"data__format": "choice", "train__max_length": 16}
    member = nodes.member(node, **keys)
    assert int(notes(nodes, node, **keys).split()[0]) > 0
    _, report = nodes.train(node, **keys)
    after = read_score("after", report)
    assert after.rows == member["held-out"] > 0
    assert 0 <= after.correct <= after.rows


def test_a_class_that_the_model_has_no_score_for(nodes: Nodes) -> None:
    keys: dict[str, Any] = {"model__task": "classification", "data__format": "classification"}
    for more in ({"model__num_labels": 2}, {"data__labels": "0,1"}):
        error = refused(nodes, nodes.deployed("north"), **keys, **more)
        assert re.search(r"(class|one of '0', '1').* got (int ')?2", error)
    taken = nodes.member(nodes.deployed("north"), **keys, model__num_labels=3)
    assert taken["rows"] > 0


def test_classes_that_nobody_names(nodes: Nodes) -> None:
    keys: dict[str, Any] = {"model__task": "classification", "data__format": "classification"}
    error = refused(nodes, nodes.deployed("north"), **keys, data__partition="own")
    assert re.match(r"Expected model\.num-labels or data\.labels for a classification", error)


def test_training_that_diverges_is_a_reason_not_a_crash(nodes: Nodes) -> None:
    _, report = nodes.train(
        nodes.simulated(0), train__learning_rate=1e30, train__optimizer="sgd",
        train__max_grad_norm=0.0, train__steps=4,
    )  # fmt: skip
    assert re.match(r"Expected a finite training loss, got .*; lower train\.learn", report["error"])
    assert nodes.train(nodes.simulated(0))[1]["steps"] == 2


def test_an_unforeseen_error_at_a_deployed_site_says_nothing_of_its_rows(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("a patient's name")

    monkeypatch.setattr(Worker, "site", fail)
    told = nodes.member(nodes.deployed("north"))["error"]
    assert told == "KeyError: the log at the site says what is wrong."
    assert "a patient's name" in nodes.errors[0]
    with pytest.raises(KeyError):  # a simulation shows everything
        nodes.member(nodes.simulated(0))
