"""Homomorphic encryption in whole runs: the same model, opened by a site that has the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from models.section import ConfigError
from privacy.secure import ckks_keys
from strategies.flower import RoundError
from tests.fakes import FakeGrid
from tests.flower_app.nodes import NAMES, Nodes
from tests.flower_app.runs import bytes_below, deploy, run, simulate
from tests.flower_app.test_secure_runs import LOW, assert_close, assert_left_out

pytest.importorskip("tenseal", reason="needs ./scripts/setup ckks")

CKKS: dict[str, Any] = {"secure__aggregation": "ckks"}


def test_sums_are_those_of_masks_bit_for_bit(nodes: Nodes) -> None:
    masks, _ = simulate(nodes, "masks", LOW | {"secure__aggregation": "masks"})
    folder, grid = simulate(nodes, "ckks", LOW | CKKS)
    assert bytes_below(folder / "adapter") == bytes_below(masks / "adapter")
    kinds = [q.metadata.message_type for q in grid.questions if q.metadata.group_id != "roll-call"]
    assert kinds == [
        *["query.ckks_advertise"] * 3, *["train"] * 3, "query.ckks_open", *["evaluate"] * 3,
    ]  # fmt: skip
    assert [file for file in (folder / "sites").rglob("*") if file.is_file()] == []


def deployed(nodes: Nodes, openers: tuple[str, ...], **keys: Any) -> tuple[Path, FakeGrid]:
    folder = nodes.folder / "keys"
    ckks_keys.main([str(folder)])
    keys = CKKS | {"run__output_dir": str(nodes.folder / "runs"), "data__partition": "own"} | keys
    files = {name: ckks_keys.SECRET if name in openers else ckks_keys.PUBLIC for name in NAMES}
    configs = [nodes.deployed(name, ckks_path=str(folder / files[name])) for name in NAMES]
    grid = nodes.grid(*configs, **keys)
    return run(nodes, grid, **keys), grid


def test_deployed_sites_of_which_one_opens_the_sums(nodes: Nodes) -> None:
    reference, _ = deploy(nodes, "plain")
    folder, grid = deployed(nodes, ("north",), strategy__min_sites=3)
    assert_close(folder, reference, 2e-6)
    asked = [q for q in grid.questions if q.metadata.message_type == "query.ckks_open"]
    assert len(asked) == 2 and len({q.metadata.dst_node_id for q in asked}) == 1


def test_an_update_that_is_not_finite_gets_into_no_sum(nodes: Nodes) -> None:
    assert_left_out(nodes, **CKKS)


def test_a_run_that_nobody_could_open_ends_with_the_reason(nodes: Nodes) -> None:
    with pytest.raises(RoundError, match="Expected a site with the secret key, to open sums"):
        deployed(nodes, (), strategy__min_sites=3)


def test_a_key_is_asked_for_at_the_roll_call(nodes: Nodes) -> None:
    with pytest.raises(ConfigError, match="Expected 'ckks-path' in this node's config, since"):
        deploy(nodes, "secure", CKKS, run__deadline_s=0.3)


def test_a_site_sends_nothing_in_the_open_and_takes_no_step_of_masks(nodes: Nodes) -> None:
    delta, report = nodes.train(nodes.simulated(0), **CKKS)
    assert not delta and report["error"].startswith("Expected terms of a sum with run, round")
    answer = nodes.hand("query.secure_advertise", nodes.simulated(0), RecordDict(), **CKKS)
    told = dict(answer.config_records["answer"])
    assert str(told["error"]).startswith("Expected no 'secure_advertise' with secure.aggregation")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy__rule": "median"}, r"secure\.groups=1, got strategy\.rule='median'"),
        ({"privacy__place": "distributed"}, r"aggregation='masks' with .*got 'ckks', where"),
        ({"privacy__place": "central"}, r"place='local' or 'distributed' with secure\.agg"),
    ],
)
def test_what_cannot_be_had_is_refused(
    nodes: Nodes, settings: Mapping[str, Any], text: str
) -> None:
    private = {"privacy__unit": "client", "privacy__noise_multiplier": 1.0}
    private |= {"strategy__weighting": "uniform"}
    given = private | settings if "privacy__place" in settings else settings
    with pytest.raises(ConfigError, match=text):
        simulate(nodes, "runs", CKKS | dict(given))
