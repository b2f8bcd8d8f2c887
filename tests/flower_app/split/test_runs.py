"""Split learning in whole runs: three sites, their streams, and the middle at the server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from flower_app import client_app, generate
from flower_app.config import parse
from flower_app.node import parse_node
from flower_app.split.server import SplitIntake, finite, mean_of
from flower_app.worker import Worker
from models.evaluate import Score, evaluate
from models.payload import Payload
from models.section import ConfigError
from models.split.generate import load_for_text
from models.split.load import SERVER, SITE, Cuts, PartName, write_parts
from models.split.rounds import Learnt
from tests.fakes import Answer, FakeGrid
from tests.flower_app.nodes import NAMES, Nodes
from tests.flower_app.runs import Killed, bytes_below, deploy, killed_in, rows, run, simulate
from tests.models.split.families import tiny

SPLIT: dict[str, Any] = {"payload__kind": "split", "split__wire": "fp32"}


def test_three_sites_train_one_model_across_the_cut(nodes: Nodes) -> None:
    folder, grid = simulate(nodes, "split", SPLIT, run__rounds=3, train__learning_rate=0.05)
    kinds = [q.metadata.message_type for q in grid.questions if q.metadata.group_id != "roll-call"]
    assert kinds == ["query.split_key"] * 3 + ["train"] * 9 + ["evaluate"] * 3
    sites = rows(folder, "site")
    assert [row["status"] for row in sites] == ["ok"] * 9
    for row in sites:
        assert row["bytes_up"] > row["stream_bytes_up"] > 0
        assert row["bytes_down"] > row["stream_bytes_down"] > 0
        # Hidden states and gradients, both ways: 4 x hidden size x bytes of a number.
        assert 4 * 32 * 4 < row["stream_bytes_per_token"] < 4 * 32 * 4 * 1.05
    first, last = rows(folder, "evaluation")[0], rows(folder, "evaluation")[-1]
    assert last["round"] == 3 and last["loss"] < first["loss"]


def joined(nodes: Nodes, folder: Path, **keys: Any) -> float:
    """Held-out loss of the model in one piece with a run's adapter, over all sites' rows."""
    auto: Any = AutoModelForCausalLM
    if keys.get("model__task") == "classification":
        auto = partial(AutoModelForSequenceClassification.from_pretrained, num_labels=3)
    else:
        auto = AutoModelForCausalLM.from_pretrained
    tuned = PeftModel.from_pretrained(auto(nodes.model), str(folder / "adapter"))
    config, worker = parse(nodes.flat(**keys)), Worker()
    sites = [worker.site(config, parse_node(nodes.simulated(at))) for at in range(3)]
    tuned.requires_grad_(True)
    whole = Payload("full", tuned)
    scores = [evaluate(whole, site.held_out, config.train) for site in sites]
    return sum(scores, Score()).loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy__rule": "lora-svd", "split__head_blocks": 2, "train__grad_accumulation": 2},
        {"strategy__rule": "median", "split__middle": "none"},
        {"strategy__rule": "lora-freeze-a", "split__head": "none"},
    ],
)
def test_the_parts_join_into_one_adapter(nodes: Nodes, settings: dict[str, Any]) -> None:
    keys = SPLIT | settings
    folder, _ = simulate(nodes, "split", keys)
    trained = load_file(folder / "adapter" / "adapter_model.safetensors")
    moved = {name for name, t in trained.items() if "lora_B" in name and bool(t.abs().sum() > 0)}
    blocks = {name.split(".layers.")[1][0] for name in moved}
    frozen = {"split__head": {"0"}, "split__middle": {"1", "2"}}
    expected = {"0", "1", "2", "3"}.difference(*(frozen[key] for key in settings if key in frozen))
    assert blocks == expected
    last = rows(folder, "evaluation")[-1]
    assert joined(nodes, folder, **keys) == pytest.approx(last["loss"], abs=1e-5)


def test_a_sites_last_block_may_stay_with_it(nodes: Nodes) -> None:
    keys = SPLIT | {"payload__personal": "layers.3", "train__learning_rate": 0.05}
    folder, _ = simulate(nodes, "split", keys)
    trained = load_file(folder / "adapter" / "adapter_model.safetensors")
    moved = {name for name, t in trained.items() if "lora_B" in name and bool(t.abs().sum() > 0)}
    assert {name.split(".layers.")[1][0] for name in moved} == {"0", "1", "2"}
    kept = {path.parent.name: path.read_bytes() for path in folder.glob("sites/*/*.safetensors")}
    assert set(kept) == set(NAMES) and len(set(kept.values())) == 3
    first, last = rows(folder, "evaluation")[0], rows(folder, "evaluation")[-1]
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("middle", ["lora", "full"])
def test_a_sites_own_adapter_goes_with_the_servers_middle(
    nodes: Nodes, middle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = SPLIT | {"payload__personal": "layers.3", "split__middle": middle}
    folder, other = (
        simulate(nodes, name, keys, train__learning_rate=rate)[0]
        for name, rate in (("split", 0.05), ("other", 0.01))
    )

    def digest(adapter: Path, *wanted: PartName) -> str:
        return load_for_text(nodes.model, wanted, Cuts(), adapter)[1]

    server = digest(folder / "adapter", *SERVER)
    assert digest(folder / "adapter", *SITE) == server != digest(other / "adapter", *SITE)
    own = [path / "adapter" for path in sorted((folder / "sites").iterdir())]
    assert len(own) == 3 and {digest(adapter, *SITE) for adapter in own} == {server}
    tails = [load_file(adapter / "adapter_model.safetensors") for adapter in own]
    assert not any(".layers.1." in name for name in tails[0])
    assert any(not torch.equal(tails[0][name], tails[1][name]) for name in tails[0])
    assert {digest(path, *SITE) for path in other.glob("sites/*/adapter")}.isdisjoint({server})
    # In one piece it would be a model with an untrained middle.
    (own[0].parent / "config.toml").write_bytes((folder / "config.toml").read_bytes())
    assert generate.main(["--run", str(own[0].parent), "--prompt", "the cat"]) == 2
    assert "Expected an adapter of the whole model in" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"Expected an adapter with a middle in .*a site's own"):
        digest(own[0], *SERVER)


def test_an_encoder_is_cut_for_classification(
    nodes: Nodes, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = nodes.folder / "bert"
    tiny("bert", vocab_size=len(tiny_tokenizer)).base_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    nodes.model = folder
    keys = SPLIT | {
        "model__name": str(folder), "model__task": "classification", "model__num_labels": 3,
        "data__format": "classification",
    }  # fmt: skip
    run_folder, _ = simulate(nodes, "split", keys)
    last = rows(run_folder, "evaluation")[-1]
    assert joined(nodes, run_folder, **keys) == pytest.approx(last["loss"], abs=1e-5)


def test_each_side_needs_its_own_folder_only(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = deploy(nodes, "whole", SPLIT)
    parts = write_parts(nodes.model, nodes.folder / "parts", Cuts())
    nodes.model = parts["site"]
    nodes.keys["model.name"] = str(parts["server"])
    apart, _ = deploy(nodes, "apart", SPLIT)
    assert bytes_below(apart / "adapter") == bytes_below(whole / "adapter")


@pytest.mark.parametrize("listen", ["0.0.0.0:9095", "[::]:9095", "localhost:9095", "127.0.0.1:0"])
def test_deployed_sites_are_not_sent_to_their_own_machine(nodes: Nodes, listen: str) -> None:
    keys = SPLIT | {"split__listen": listen, "split__address": ""}
    with pytest.raises(ConfigError, match=r"Expected split.address with deployed sites .* set it"):
        deploy(nodes, "run", keys)


def test_a_killed_server_goes_on_as_if_nothing_had_been(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = simulate(nodes, "reference", SPLIT, run__rounds=3)
    keys = SPLIT | {"run__rounds": 3, "run__output_dir": str(nodes.folder / "killed")}
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    killed_in(grid, 2, monkeypatch)
    with pytest.raises(Killed):
        run(nodes, grid, **keys)
    nodes.states.clear()  # another run, for Flower
    again = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    folder = run(nodes, again, **keys, run__resume="latest")
    assert bytes_below(folder) == bytes_below(reference)


def test_a_site_that_lost_its_key_fails_one_round(nodes: Nodes) -> None:
    # These sites answer one after another, so that no word of the one that fails comes in time.
    keys = SPLIT | {"run__rounds": 3, "run__output_dir": str(nodes.folder / "lost")}
    keys |= {"split__wait_s": 1.0}
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    north = grid.sites[2]

    def restarted(question: Any) -> Any:
        if (question.metadata.message_type, question.metadata.group_id) == ("train", "2"):
            nodes.states.pop(json.dumps(nodes.simulated(1), sort_keys=True))
        return north(question)

    grid.sites[2] = restarted
    folder = run(nodes, grid, **keys)
    status = {(row["round"], row["site"]): row for row in rows(folder, "site")}
    assert "Expected a key for the stream of this run" in status[2, "north"]["reason"]
    assert status[2, "east"]["status"] == status[2, "west"]["status"] == "ok"
    assert {status[3, name]["status"] for name in NAMES} == {"ok"}


class Together(FakeGrid):
    """Sites that train at the same time, each in a thread of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.threads = {node: ThreadPoolExecutor(1) for node in self.sites}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked, alone = list(messages), self.sites

        def work(message: Message) -> Future[list[Answer]]:
            node = message.metadata.dst_node_id
            return self.threads[node].submit(lambda: list(alone[node](message)))

        training = asked[0].metadata.message_type == "train"
        under_way = {m.metadata.dst_node_id: work(m) for m in asked} if training else {}

        def answer(message: Message) -> list[Answer]:
            return (under_way.get(message.metadata.dst_node_id) or work(message)).result()

        self.sites = dict.fromkeys(alone, answer)
        sent = list(super().push_messages(asked))
        self.sites = alone
        return sent


def together(nodes: Nodes, name: str, **keys: Any) -> Path:
    """A simulation of three sites at the same time; its folder."""

    class Each(threading.local):
        """A worker for each thread, as in processes."""

        def __init__(self) -> None:
            self.worker = Worker()

    each = Each()

    class One:
        def __getattr__(self, attribute: str) -> Any:
            return getattr(each.worker, attribute)

    nodes.monkeypatch.setattr(client_app, "_WORKER", One())
    keys |= SPLIT | {"run__output_dir": str(nodes.folder / name)}
    inner = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    return run(nodes, Together(inner.sites), **keys)


@pytest.mark.parametrize("schedule", ["client-batch", "hierarchical", "auto"])
def test_sites_share_the_middle_at_the_same_time(nodes: Nodes, schedule: str) -> None:
    keys = {"split__schedule": schedule, "run__rounds": 3, "train__learning_rate": 0.05}
    folder = together(nodes, "one", **keys)
    assert {row["status"] for row in rows(folder, "site")} == {"ok"}
    first, last = rows(folder, "evaluation")[0], rows(folder, "evaluation")[-1]
    assert last["loss"] < first["loss"] - 0.5
    assert joined(nodes, folder, **SPLIT, **keys) == pytest.approx(last["loss"], abs=1e-5)
    facts = json.loads((folder / "checkpoint" / "checkpoint.json").read_text())["facts"]
    assert facts["schedule"] in ("client-batch", "hierarchical")
    assert schedule in ("auto", facts["schedule"])
    if schedule != "auto":  # which may pick the other one next time
        assert bytes_below(together(nodes, "other", **keys)) == bytes_below(folder)


def test_replicas_that_train_nothing_go_on_round_after_round(nodes: Nodes) -> None:
    keys = {"split__schedule": "hierarchical", "split__middle": "none", "run__rounds": 3}
    folder = together(nodes, "none", **keys)
    assert [row["status"] for row in rows(folder, "site")] == ["ok"] * 9


def test_a_middle_that_is_not_finite_is_not_kept() -> None:
    good, bad = Learnt({"w": torch.ones(2)}, 3), Learnt({"w": torch.tensor([1.0, torch.nan])}, 1)
    assert finite([good, bad, Learnt({"w": torch.full((2,), torch.inf)}, 1)]) == [good]
    before = {"a.lora_A.weight": torch.ones(2, 3)}
    assert mean_of(before, []) == before and mean_of({}, [Learnt({}, 1)] * 2) == {}


def test_nobody_waits_for_a_site_that_says_it_cannot() -> None:
    told: list[tuple[str, str]] = []

    class Server:
        def absent(self, site: str, why: str) -> None:
            told.append((site, why))

    SplitIntake(Server(), None, NAMES, {}).lost("east", "no rows")  # type: ignore[arg-type]
    assert told == [("east", "no rows")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split__head_blocks": 3}, "their sum must be below 4"),
        ({"split__head": "none", "split__tail": "none"}, "something to train at the sites"),
        ({"train__ditto_lambda": 0.1}, "Expected train.ditto-lambda=0.0 with payload.kind='split'"),
        ({"train__packing": "on"}, "Expected train.packing='off' or 'auto' with payload.kind"),
        ({"strategy__rule": "lora-exact"}, "needs no whole model at the server"),
        ({"run__baselines": True}, "Expected run.baselines=false with payload.kind='split'"),
        ({"split__listen": "nowhere.invalid:1"}, "Expected to listen at 'nowhere.invalid:1'"),
    ],
)
def test_what_cannot_be_is_refused(nodes: Nodes, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        simulate(nodes, "wrong", SPLIT, **wrong)


def test_the_same_seed_gives_the_same_bytes(nodes: Nodes) -> None:
    one, _ = simulate(nodes, "one", SPLIT)
    other, _ = simulate(nodes, "other", SPLIT)
    assert bytes_below(one) == bytes_below(other)
