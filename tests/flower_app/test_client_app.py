"""The ClientApp's answers, in process: the same in a simulation and at a deployed site."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict
from ray import cloudpickle

from flower_app import client_app
from flower_app.recorder import read_score
from flower_app.worker import Worker
from models.base import digest_of
from models.layout import Layout
from strategies import aggregate
from tests.flower_app.nodes import NAMES, Nodes, raw, site_rows, write_rows
from tests.flower_app.runs import rows, simulate


def fields(content: RecordDict) -> dict[str, Any]:
    """The report in a reply."""
    return dict(content.config_records["report"])


def test_roll_call_of_a_partition(nodes: Nodes) -> None:
    members = [nodes.member(nodes.simulated(at)) for at in range(3)]
    assert [member["site"] for member in members] == list(NAMES)
    assert [member["rows"] + member["held-out"] for member in members] == [14, 18, 22]
    for member in members:
        assert member["rows"] > 0 and member["held-out"] > 0
        assert member["base"] == digest_of(nodes.model)
        assert (member["simulated"], member["partitions"]) == (True, 3)
        assert "notes" not in member  # counts of cut rows stay in the site's own log
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
    assert (report["round"], report["layout"], report["steps"]) == (1, Layout.of(start).digest, 2)
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
        found = read_score("before", nodes.evaluate(node, arrays))
        expected = read_score(name, report)
        assert (found.counted, found.rows) == (expected.counted, expected.rows)
        assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)


def test_scoring_after_training_can_be_left_out(nodes: Nodes) -> None:
    _, report = nodes.train(nodes.simulated(0), train__score_after=False)
    assert read_score("after", report).counted == 0
    assert read_score("before", report).counted > 0


def test_sites_score_in_the_rounds_that_are_asked_for(nodes: Nodes) -> None:
    folder, _ = simulate(nodes, "seldom", run__rounds=4, train__score_every=2)
    assert [row["round"] for row in rows(folder, "evaluation")] == [0, 2, 4]
    scored = {row["round"] for row in rows(folder, "site") if row["loss_before"] is not None}
    assert scored == {1, 3}
    after = {row["round"] for row in rows(folder, "site") if row["loss_after"] is not None}
    assert after == scored
    always, _ = simulate(nodes, "always", run__rounds=4)
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (always / weights).read_bytes()


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
    # Of its 18 rows, 4 are held out as well and are not trained on.
    assert (member["held-out"], member["rows"]) == (6, 14)


def baseline(nodes: Nodes, site: str, partition: int = 0, **keys: Any) -> dict[str, Any]:
    content = nodes.ask(
        "train.baseline", nodes.simulated(partition), nodes.start(**keys), {"site": site}, **keys
    )
    return fields(content)


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


def test_a_baseline_alone_uses_the_server_optimiser_as_well(nodes: Nodes) -> None:
    keys: dict[str, Any] = {
        "run__rounds": 1,
        "strategy__server_optimizer": "adam",
        "strategy__server_learning_rate": 0.05,
    }
    node, start = nodes.simulated(1), nodes.start(**keys)
    delta, _ = nodes.train(node, 1, start, **keys)
    new = aggregate("mean", start, [delta], server_optimizer="adam", server_learning_rate=0.05)
    plan = {"round": 1, "layout": Layout.of(start).digest}
    content = nodes.ask("evaluate", node, new, plan, **keys)
    stepped = read_score("before", fields(content))
    assert read_score("own", baseline(nodes, "north", **keys)).loss == pytest.approx(stepped.loss)


def test_a_deployed_site_trains_no_baseline(nodes: Nodes) -> None:
    content = nodes.ask("train.baseline", nodes.deployed("north"), nodes.start(), {"site": "north"})
    assert re.search(
        r"Expected a simulation, got a deployed site",
        str(content.config_records["report"]["error"]),
    )


def test_classes_are_trained_and_scored(nodes: Nodes, tiny_models: Mapping[str, Path]) -> None:
    keys: dict[str, Any] = {
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


def test_what_ray_sends_of_the_app_brings_no_worker_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a process would read model and rows again with every message."""

    def copied(worker: Worker, protocol: int) -> Any:
        raise AssertionError("a worker was sent")

    monkeypatch.setattr(Worker, "__reduce_ex__", copied)
    app = cloudpickle.loads(cloudpickle.dumps(client_app.app))
    assert app._registered_funcs.keys() == client_app.app._registered_funcs.keys()
