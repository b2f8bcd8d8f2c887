"""FLTrust's root data at the server, and conditions on the number of sites before round 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flower_app import compose
from flower_app.config import parse
from flower_app.data.source import DataError
from flower_app.trusted import RootTrainer
from models.payload import Payload
from models.section import ConfigError
from strategies import aggregate
from tests.flower_app.nodes import Nodes, site_rows, write_rows
from tests.flower_app.runs import simulate


def root(nodes: Nodes) -> str:
    return write_rows(nodes.folder / "root.jsonl", site_rows("root", 12))


def trainer(nodes: Nodes, **keys: Any) -> tuple[RootTrainer, Payload]:
    config = parse(nodes.flat(strategy__rule="fltrust", strategy__root_source=root(nodes), **keys))
    base = compose.load_base(config)
    payload = compose.attach(config, base)
    return RootTrainer(config, base, payload), payload


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_it_trains_on_the_rows_and_puts_back_what_was_loaded(nodes: Nodes) -> None:
    ours, payload = trainer(nodes, payload__dropout=0.0, data__eval_fraction=0.0)
    start = payload.select()
    update = ours.update(1, start, {})
    assert gap(update, {n: torch.zeros_like(t) for n, t in update.items()}) > 1e-4
    again = ours.update(1, start, {})
    later = ours.update(2, start, {})
    assert gap(update, again) == 0 and gap(update, later) > 0
    assert gap(payload.select(), start) == 0  # what was loaded is there again


def test_rows_that_are_missing_are_an_error(nodes: Nodes) -> None:
    config = parse(nodes.flat(strategy__rule="fltrust", strategy__root_source="/nowhere.jsonl"))
    base = compose.load_base(config)
    with pytest.raises(DataError, match="nowhere"):
        RootTrainer(config, base, compose.attach(config, base))


def test_a_run_with_fltrust_stays_within_the_norm_of_the_root_update(nodes: Nodes) -> None:
    keys = {
        "strategy__rule": "fltrust", "strategy__root_source": root(nodes), "run__rounds": 1,
        "payload__kind": "soft-prompt", "payload__dropout": 0.0,
    }  # fmt: skip
    folder, _ = simulate(nodes, "fltrust", keys)
    config = parse(nodes.flat(**keys))
    base = compose.load_base(config)
    payload = compose.attach(config, base)
    start = payload.select()
    own = RootTrainer(config, base, payload).update(1, start, {})
    deltas = {
        name: nodes.train(nodes.simulated(at), start=start, **keys)[0]
        for at, name in enumerate(("east", "north", "west"))
    }
    wanted = aggregate("fltrust", start, deltas, trusted=own)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    (new,) = saved.values()
    (expected,), (before,) = wanted.values(), start.values()
    torch.testing.assert_close(new.reshape(-1), expected.reshape(-1))
    length = math.sqrt(sum(float(t.square().sum()) for t in own.values()))
    assert 0 < float((new - before).norm()) <= length * (1 + 1e-5)


@pytest.mark.parametrize("key", ["strategy__rule", "strategy__pre"])
def test_fltrust_without_root_data_is_refused(nodes: Nodes, key: str) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.root-source with 'fltrust', got nothing"):
        parse(nodes.flat(**{key: "fltrust"}))


def test_too_few_sites_for_a_rule_are_refused_before_the_first_round(nodes: Nodes) -> None:
    with pytest.raises(ConfigError, match=r"num-byzantine=1 to be at most 0 \(n=3 needs n ≥ 2f"):
        simulate(nodes, "krum", strategy__rule="krum")


@pytest.mark.parametrize(("rslora", "scale"), [("false", 8.0), ("true", 16 / math.sqrt(2))])
def test_the_scale_of_lora_is_that_of_the_model(nodes: Nodes, rslora: str, scale: float) -> None:
    config = parse(nodes.flat(payload__options=f'{{"use_rslora": {rslora}}}'))
    payload = compose.attach(config, compose.load_base(config))
    assert payload.lora_scale == pytest.approx(scale)
    plain = parse(nodes.flat(payload__kind="soft-prompt"))
    assert compose.attach(plain, compose.load_base(plain)).lora_scale == 1.0
