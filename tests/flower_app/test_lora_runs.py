"""Whole runs under the rules for LoRA: the way down, what is saved, and what resuming finds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flower_app import compose, generate
from flower_app import run as server
from flower_app.config import defaults, parse
from models.section import ConfigError
from strategies.messages import decode_all
from tests.fakes import FakeGrid, at_the_server
from tests.flower_app.nodes import NAMES, Nodes
from tests.flower_app.runs import Killed, Shared, bytes_below, killed_in, rows


def simulate(
    nodes: Nodes, name: str, rule: str, kill_in: int = 0, **keys: Any
) -> tuple[Path, FakeGrid]:
    keys = {"strategy__rule": rule, "run__output_dir": str(nodes.folder / name)} | keys
    keys = {"run__rounds": 3} | keys
    grid = nodes.grid(*map(nodes.simulated, range(3)), **keys)
    if kill_in:
        with pytest.MonkeyPatch.context() as patch, at_the_server():
            killed_in(grid, kill_in, patch)
            with pytest.raises(Killed):
                server.run(grid, parse(nodes.flat(**keys)))
        return nodes.folder / name / "latest", grid
    with at_the_server():
        return server.run(grid, parse(nodes.flat(**keys))).path, grid


def products(module: Any) -> dict[str, Tensor]:
    """B A of every adapted module, times LoRA's scale, in float64."""
    return {
        name.replace(".default", ""): layer.lora_B["default"].weight.double()
        @ layer.lora_A["default"].weight.double()
        * layer.scaling["default"]
        for name, layer in module.named_modules()
        if "default" in getattr(layer, "lora_A", {})
    }


def saved(nodes: Nodes, folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(nodes.model)
    return PeftModel.from_pretrained(base, folder / "adapter")


@pytest.mark.parametrize("rule", ["lora-exact", "lora-stack"])
def test_a_round_ends_with_the_mean_of_what_the_sites_trained(nodes: Nodes, rule: str) -> None:
    folder, _ = simulate(nodes, "runs", rule, run__rounds=1)
    start = nodes.start()
    wanted: dict[str, Tensor] = {}
    total = 0
    for at in range(3):
        delta, report = nodes.train(nodes.simulated(at), 1, start)
        total += report["num-examples"]
        for name in start:
            if ".lora_A." in name:
                other = name.replace(".lora_A.", ".lora_B.")
                new = {n: start[n].double() + delta[n].double() for n in (name, other)}
                part = report["num-examples"] * 8.0 * new[other] @ new[name]  # 16 / 2
                module = name.partition(".lora_A.")[0]
                wanted[module] = wanted.get(module, torch.zeros_like(part)) + part
    found = products(saved(nodes, folder))
    assert found.keys() == wanted.keys()
    for module, product in found.items():
        mean = wanted[module] / total
        assert float((product - mean).abs().max()) <= 2e-6 * float(mean.abs().max())


@pytest.mark.parametrize("rule", ["lora-exact", "lora-stack"])
def test_the_saved_adapter_scores_what_the_sites_scored(
    nodes: Nodes, shared: Shared, rule: str
) -> None:
    folder, grid = shared.simulate(strategy__rule=rule, run__rounds=3)
    (final,) = [row for row in rows(folder, "evaluation") if row["round"] == 3]
    model = saved(nodes, folder)
    assert max(model.peft_config["default"].rank_pattern.values()) > 2
    assert len(grid.questions[-1].content.array_records["fold"]) > 0
    model.merge_and_unload().save_pretrained(nodes.folder / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (nodes.folder / "merged" / name).write_bytes((nodes.model / name).read_bytes())
    keys = {"model__name": str(nodes.folder / "merged")}
    start = nodes.start(**keys)  # LoRA that changes nothing
    for at, site in enumerate(NAMES):
        report = nodes.evaluate(nodes.simulated(at), start, **keys)
        assert report["before-loss-sum"] == pytest.approx(final["sums"][site][0], rel=1e-5)


@pytest.mark.parametrize("rule", ["lora-exact", "lora-stack"])
def test_a_killed_run_ends_with_the_same_bytes(nodes: Nodes, shared: Shared, rule: str) -> None:
    whole, _ = shared.simulate(strategy__rule=rule, run__rounds=3)
    simulate(nodes, "cut", rule, kill_in=3)
    nodes.restart()
    again, _ = simulate(nodes, "cut", rule, run__resume="latest")
    assert bytes_below(again) == bytes_below(whole)
    assert [r["product_gap"] for r in rows(again, "round")] == [
        r["product_gap"] for r in rows(whole, "round")
    ]


def test_bytes_down_hold_the_fold_and_say_so(nodes: Nodes, shared: Shared) -> None:
    folder, grid = shared.simulate(strategy__rule="lora-stack", run__rounds=3)
    payload = 4 * sum(tensor.numel() for tensor in nodes.start().values())
    sent: dict[str, int] = {}
    for question in grid.questions:
        if question.metadata.message_type == "train":
            records = question.content.array_records
            size = sum(len(a.data) for a in records["fold"].values()) if "fold" in records else 0
            sent[question.metadata.group_id] = size
    assert sent["1"] == 0 < sent["2"] < sent["3"]
    for row in rows(folder, "site"):
        assert row["bytes_down"] == payload + sent[str(row["round"])]
    for row in rows(folder, "round"):
        assert row["bytes_down_fold"] == 3 * sent[str(row["round"])]
        assert 0 < row["product_gap"] < 2


def test_baselines_start_without_a_fold(nodes: Nodes) -> None:
    plain = nodes.ask("train.baseline", nodes.simulated(0), nodes.start(), {"site": "north"})
    simulate(nodes, "runs", "lora-exact", run__rounds=2)  # leaves a fold in this process
    after = nodes.ask("train.baseline", nodes.simulated(0), nodes.start(), {"site": "north"})
    assert dict(plain.config_records["report"]) == dict(after.config_records["report"])


def test_text_is_generated_with_what_was_folded(
    nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = simulate(nodes, "runs", "lora-exact", train__learning_rate=0.05, run__rounds=2)
    said = []
    for extra in ([], ["--base"]):
        arguments = ["--run", str(folder), "--prompt", "the cat", "--max-new-tokens", "12"]
        assert generate.main([*arguments, "--temperature", "0", *extra]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]


def test_a_payload_that_the_rule_cannot_aggregate_ends_the_run_before_it_begins(
    nodes: Nodes,
) -> None:
    with pytest.raises(ConfigError, match=r"plain product for .*'lora-exact'.*of DoRA"):
        simulate(nodes, "runs", "lora-exact", payload__options='{"use_dora": true}')
    with pytest.raises(ConfigError, match=r"payload\.kind='lora' with .*'lora-mean', got 'prefix'"):
        simulate(nodes, "runs", "lora-mean", payload__kind="prefix")


LIARS = {"strategy.pre": "nnm", "strategy.rule": "median"}
MOMENTUM = {"strategy.server-optimizer": "momentum"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (LIARS, r"single sites for strategy\.rule='median' with LoRA factors"),
        (LIARS | {"payload.kind": "split"}, r"single sites .* with LoRA factors"),
        ({"strategy.rule": "lora-svd"} | MOMENTUM, r"'none' with LoRA factors and lora-svd"),
        ({"strategy.pre": "nnm"} | MOMENTUM, r"'none' with LoRA factors and nnm\+mean"),
        (LIARS | {"strategy.rule": "lora-exact"}, r"no stage that judges .*'lora-exact'"),
        ({"strategy.pre": "clip,module-screen"}, r"'module-screen' first in strategy\.pre"),
    ],
)
def test_stages_that_do_not_go_with_factors_are_refused(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose.check_names(parse({**defaults(), **keys}))


@pytest.mark.parametrize(
    "other",
    [
        {"payload.kind": "soft-prompt"},
        {"payload.personal": "lora_B"},
        {
            "payload.kind": "split",
            **dict.fromkeys(("split.head", "split.middle", "split.tail"), "full"),
        },
    ],
)
def test_without_pairs_of_factors_they_do(other: dict[str, str]) -> None:
    compose.check_names(parse({**defaults(), **LIARS, **MOMENTUM, **other}))


def test_with_a_frozen_only_b_travels_and_the_adapter_holds_both(nodes: Nodes) -> None:
    folder, _ = simulate(nodes, "runs", "lora-freeze-a")
    whole = nodes.start()
    assert all(".lora_B." in name for name in nodes.start(strategy__rule="lora-freeze-a"))
    size = 4 * sum(tensor.numel() for name, tensor in whole.items() if ".lora_B." in name)
    for row in rows(folder, "site"):
        assert (row["status"], row["bytes_down"], row["bytes_up"]) == ("ok", size, size)
    assert [row["product_gap"] for row in rows(folder, "round")] == [0.0] * 3
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == whole.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, whole[name]) is (".lora_A." in name)
    model = saved(nodes, folder)
    (final,) = [row for row in rows(folder, "evaluation") if row["round"] == 3]
    assert products(model) and final["loss"] < rows(folder, "evaluation")[0]["loss"]


def test_in_turns_one_factor_stays_as_it_is(nodes: Nodes) -> None:
    folder, grid = simulate(nodes, "runs", "lora-alternate")
    before = {name: tensor.clone() for name, tensor in nodes.start().items()}
    sent = [m["arrays"] for m in arrays_sent(grid, "train")[::3]]
    sent.append(arrays_sent(grid, "evaluate")[0]["arrays"])
    for round_, record in enumerate(sent[1:], 1):
        after = decode_all(record)
        for name, tensor in after.items():
            still = ".lora_A." if round_ % 2 else ".lora_B."
            assert torch.equal(tensor, before[name]) is (still in name)
        before = after
    delta, _ = nodes.train(nodes.simulated(1), 2, before, strategy__rule="lora-alternate")
    for name, tensor in delta.items():
        assert bool(tensor.any()) is (".lora_A." in name)  # at the site, too
    assert max(row["product_gap"] for row in rows(folder, "round")) < 1e-6
    simulate(nodes, "cut", "lora-alternate", kill_in=3)
    nodes.restart()
    again, _ = simulate(nodes, "cut", "lora-alternate", run__resume="latest")
    assert bytes_below(again) == bytes_below(folder)


@pytest.mark.parametrize("rule", ["lora-exact", "lora-stack", "lora-svd"])
def test_sites_of_different_ranks_make_one_model(nodes: Nodes, rule: str) -> None:
    keys = {"payload__rank": 3, "payload__site_ranks": "1, 3", "run__rounds": 2}
    folder, _ = simulate(nodes, "runs", rule, **keys)
    found = [(row["site"], row.get("rank")) for row in rows(folder, "site")]
    assert found == [*zip(NAMES, (1, None, 1), strict=True)] * 2
    first, _, last = rows(folder, "evaluation")
    assert last["loss"] < first["loss"]


def test_a_site_of_a_lower_rank_trains_as_lora_of_that_rank(nodes: Nodes) -> None:
    wide = nodes.start(payload__rank=3)
    with torch.no_grad():
        for name in wide:  # B that is not zero, as in later rounds
            wide[name] = torch.randn(wide[name].shape, generator=torch.Generator().manual_seed(1))
    narrow = {n: t[:2] if ".lora_A." in n else t[:, :2] for n, t in wide.items()}
    # Adam would turn the rounding of a gradient near zero into a step of some length.
    keys = {"strategy__rule": "lora-svd", "train__optimizer": "sgd"}
    whole = {"payload__rank": 3, "payload__alpha": 6.0, "payload__dropout": 0.2, **keys}
    delta, report = nodes.train(nodes.simulated(1), 2, wide, payload__site_ranks="3,2", **whole)
    own = {"payload__rank": 2, "payload__alpha": 4.0, "payload__dropout": 0.2, **keys}
    wanted, plain = nodes.train(nodes.simulated(1), 2, narrow, **own)
    assert report["rank"] == 2 and report["train_loss"] == pytest.approx(plain["train_loss"])
    for name, tensor in delta.items():
        new, low = wide[name] + tensor, narrow[name] + wanted[name]
        used, rest = (new[:2], new[2:]) if ".lora_A." in name else (new[:, :2], new[:, 2:])
        assert torch.allclose(used, low, atol=1e-5) and not rest.any()
    deployed = nodes.deployed("north") | {"rank": 2}
    found, told = nodes.train(deployed, 2, wide, data__partition="own", **whole)
    assert told["rank"] == 2 and all(
        (wide[n] + t)[2:].abs().max() == 0 for n, t in found.items() if ".lora_A." in n
    )


def test_ranks_that_cannot_be_are_refused_with_the_remedy(nodes: Nodes) -> None:
    high = nodes.deployed("north") | {"rank": 9}
    keys = {"data__partition": "own", "strategy__rule": "lora-svd"}
    said = nodes.member(high, **keys)["error"]
    assert re.search(r"'rank' of at most 2 \(payload\.rank\).*got 9; lower it", said)
    low = nodes.deployed("north") | {"rank": 1}
    assert "error" not in nodes.member(low, **keys)
    said = nodes.member(low, data__partition="own")["error"]
    assert re.search(
        r"strategy\.rule of lora-exact, lora-stack, lora-svd with sites of a rank", said
    )
    said = nodes.member(low, data__partition="own", payload__kind="prefix")["error"]
    assert re.search(r"payload\.kind='lora' with 'rank'.*leave 'rank' out", said)
    said = nodes.member(low, payload__site_ranks="1", **keys)["error"]
    assert re.search(r"no payload\.site-ranks with deployed sites", said)
    with pytest.raises(ConfigError, match=r"lora-svd with payload\.site-ranks='1,2', got 'mean'"):
        simulate(nodes, "runs", "mean", payload__site_ranks="1,2")
    for wrong in ("1,3", "0", "two"):
        with pytest.raises(ConfigError, match=r"from 1 to payload\.rank=2.*raise payload\.rank"):
            parse(nodes.flat(payload__site_ranks=wrong))


def arrays_sent(grid: FakeGrid, kind: str) -> list[Mapping[str, Any]]:
    """Records of arrays in the questions of a kind, in order."""
    return [q.content.array_records for q in grid.questions if q.metadata.message_type == kind]
