"""What a worker process keeps between messages, and what it lets go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flower_app import compose
from flower_app.config import Config, parse
from flower_app.data.source import DataError
from flower_app.node import NodeConfig, parse_node
from flower_app.worker import Worker, pad_token, steps_per_round, train_round
from models.section import ConfigError
from models.seeds import derive
from tests.flower_app.nodes import NAMES, Nodes, raw


def configured(nodes: Nodes, **extra: Any) -> Config:
    return parse(nodes.flat(**extra))


def partition(nodes: Nodes, at: int) -> NodeConfig:
    return parse_node(nodes.simulated(at))


def test_one_model_serves_all_sites_and_its_rows_are_encoded_once(nodes: Nodes) -> None:
    worker, config = Worker(), configured(nodes)
    first = [worker.site(config, partition(nodes, at)) for at in range(3)]
    again = [worker.site(config, partition(nodes, at)) for at in range(3)]
    assert [site.name for site in first] == list(NAMES)
    assert all(one is two for one, two in zip(first, again, strict=True))
    assert worker.all_sites(config, partition(nodes, 2)) == first
    assert worker.bases.reads == 1


def test_names_are_those_of_the_partitions(nodes: Nodes) -> None:
    assert Worker().names(configured(nodes), partition(nodes, 1)) == list(NAMES)
    deployed = parse_node(nodes.deployed("north"))
    with pytest.raises(ConfigError, match=r"a simulation, got a deployed site"):
        Worker().names(configured(nodes), deployed)


@pytest.mark.parametrize(
    "keys",
    [
        {"train__max_length": 16},
        {"data__eval_fraction": 0.5},
        {"run__seed": 5},
        {"payload__kind": "prefix"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_another_configuration_is_encoded_anew(nodes: Nodes, keys: dict[str, Any]) -> None:
    worker, node = Worker(), partition(nodes, 1)
    before = worker.site(configured(nodes), node)
    changed = worker.site(configured(nodes, **keys), node)
    fresh = Worker().site(configured(nodes, **keys), node)
    assert changed is not before
    assert (changed.rows, changed.held_out_rows) == (fresh.rows, fresh.held_out_rows)
    mine, theirs = (
        [batch.inputs["input_ids"].tolist() for batch in site.batches.take(0, 3)]
        for site in (changed, fresh)
    )
    assert mine == theirs
    expected = 2 if keys.keys() & {"payload__kind", "run__seed"} else 1
    assert worker.bases.reads == expected


def test_another_base_model_takes_the_place_of_the_old_one(
    nodes: Nodes, tiny_models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old weights are gone before the new ones are read: there may be room for one only."""
    worker, node = Worker(), partition(nodes, 0)
    base, payload = worker.model(configured(nodes), node)
    old = weakref.ref(payload.module)
    del base, payload
    load, alive = compose.load_base, []

    def watched(*arguments: Any, **keys: Any) -> Any:
        gc.collect()
        alive.append(old() is not None)
        return load(*arguments, **keys)

    monkeypatch.setattr(compose, "load_base", watched)
    other, _ = worker.model(configured(nodes, model__name=str(tiny_models["gpt2"])), node)
    assert other.model.config.model_type == "gpt2"
    assert alive == [False]
    assert worker.bases.reads == 2


def test_classes_counted_in_the_data_decide_the_model(
    nodes: Nodes, tiny_models: Mapping[str, Path]
) -> None:
    keys = {
        "model__name": str(tiny_models["bert"]),
        "model__task": "classification",
        "data__format": "classification",
    }
    worker, node = Worker(), partition(nodes, 0)
    by_label, _ = worker.model(configured(nodes, **keys), node)
    by_site, _ = worker.model(configured(nodes, **keys, data__label_column="site"), node)
    named, _ = worker.model(configured(nodes, **keys, data__labels="0,1,2,3"), node)
    counts = [base.model.config.num_labels for base in (by_label, by_site, named)]
    assert counts == [3, 3, 4]
    assert worker.bases.reads == 3


def test_epochs_become_steps(nodes: Nodes) -> None:
    def steps(**keys: Any) -> int:
        config = configured(nodes, train__packing="off", data__eval_fraction=0.0, **keys)
        worker = Worker()
        sites = [worker.site(config, partition(nodes, at)).batches for at in (0, 2)]
        assert [len(batches) for batches in sites] == [4, 6]  # 14 and 22 rows in fours
        return steps_per_round(config, sites)

    assert steps(train__steps=7) == 7
    assert steps(train__steps=0, train__epochs=1.0) == 5
    assert steps(train__steps=0, train__epochs=0.5) == 3
    assert steps(train__steps=0, train__epochs=1.0, train__grad_accumulation=2) == 3


def test_pooled_rows_are_all_rows(nodes: Nodes) -> None:
    worker, config = Worker(), configured(nodes, train__packing="off")
    sites = worker.all_sites(config, partition(nodes, 0))
    pooled = worker.pooled(config, partition(nodes, 0))
    rows = sum(site.rows for site in sites)
    seen = [row for batch in pooled.take(0, len(pooled)) for row in batch.rows]
    assert sorted(seen) == list(range(rows))


def test_rounds_take_up_where_the_one_before_stopped(nodes: Nodes) -> None:
    """Two rounds of one step train on what one round of two steps trains on."""
    keys = {"train__optimizer": "sgd", "train__max_grad_norm": 0.0}
    worker, config = Worker(), configured(nodes, **keys)
    _, payload = worker.model(config, partition(nodes, 0))
    site = worker.site(config, partition(nodes, 0))
    start = payload.select()
    for round_ in (1, 2):
        train_round(config, payload, site.batches, site.name, round_, 1)
    apart = payload.select()
    payload.load(start)
    train_round(config, payload, site.batches, site.name, 1, 2)
    assert raw(payload.select()) == raw(apart)


def test_the_schedule_reaches_local_training(nodes: Nodes) -> None:
    keys = {"train__optimizer": "sgd", "train__max_grad_norm": 0.0, "train__schedule": "linear"}
    worker, config = Worker(), configured(nodes, **keys)
    _, payload = worker.model(config, partition(nodes, 0))
    site = worker.site(config, partition(nodes, 0))
    start = payload.select()

    def moved(round_: int) -> float:
        payload.load(start)
        batches = worker.site(config, partition(nodes, 0)).batches
        whole = len(batches)  # the same batch in every round
        train_round(config, payload, batches, site.name, round_, whole)
        return sum(float((t - start[name]).norm()) for name, t in payload.select().items())

    assert moved(2) < 0.75 * moved(1)  # the second of two rounds goes at half the rate


def test_a_choice_is_scored_by_its_rank(nodes: Nodes) -> None:
    rows = [
        f'{{"instruction": "the {at}", "choices": ["cat", "dog {at}"], "label": 0}}\n'
        for at in range(12)
    ]
    path = nodes.folder / "choices.jsonl"
    path.write_text("".join(rows))
    worker = Worker()
    config = configured(nodes, data__format="choice")
    node = parse_node(nodes.deployed("north", data_path=str(path)))
    base, payload = worker.model(config, node)
    site = worker.site(config, node)
    score = worker.score(config, site, payload, pad_token(base))
    assert score.rows == len(site.ranked) == site.held_out_rows > 0
    assert 0 <= score.correct <= score.rows
    assert score.counted > score.rows  # of the loss: tokens


def test_a_site_without_usable_rows_is_refused_again_when_asked_again(nodes: Nodes) -> None:
    path = nodes.folder / "later.jsonl"
    worker, config = Worker(), configured(nodes)
    node = parse_node(nodes.deployed("north", data_path=str(path)))
    for _ in range(2):
        with pytest.raises(DataError, match="found nothing"):
            worker.site(config, node)
    path.write_text(Path(nodes.own["north"]).read_text())
    assert worker.site(config, node).rows > 0


def test_order_and_dropout_are_seeded_by_purpose() -> None:
    seeds = {
        derive(0, "order", "north"),
        derive(0, "order", "south"),
        derive(1, "order", "north"),
        derive(0, "train", "north", 1),
        derive(0, "train", "north", 2),
        derive(0, "train", "north1", 2),
    }
    assert len(seeds) == 6
    assert derive(0, "order", "north") == derive(0, "order", "north") < 2**63
