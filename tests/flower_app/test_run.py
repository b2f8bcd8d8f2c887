"""A run at the server when things go wrong: what is finished stays, and the report says why."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from flwr.app import Message

from flower_app import run as server
from flower_app.config import Config, Value, defaults, parse
from flower_app.runfolder import CheckpointError
from models.base import digest_of
from models.section import ConfigError
from strategies.flower import RoundError
from tests.fakes import Answer, FakeGrid, Field, Site, at_the_server
from tests.flower_app.nodes import Nodes
from tests.flower_app.runs import run, simulate
from tests.serverpaths import unnamed


def config(model: Path, base: Path, **changes: Value) -> Config:
    flat = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    own: dict[str, Value] = {
        "model.name": str(model), "run.output-dir": str(base), "run.rounds": 2,
        "run.deadline-s": 2.0, "data.partition": "own", "train.max-length": 32,
    }  # fmt: skip
    return parse(unnamed({**defaults(), **own, **flat}))


def site(name: str, model: Path, reason: str, **changes: Field) -> Site:
    """A deployed site that presents itself well and then fails with `reason`."""

    def answer(question: Message) -> Iterable[Answer]:
        if question.metadata.message_type == "query":
            card: dict[str, Field] = {
                "site": name, "rows": 9, "held-out": 1, "base": digest_of(model),
                "simulated": False, "partitions": 0, "versions": "1",
            }  # fmt: skip
            return [Answer(report=card | changes, record="member")]
        return [Answer(report={"error": reason})]

    return answer


def latest(base: Path) -> list[dict[str, object]]:
    lines = (base / "latest" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.usefixtures("reports")
def test_a_run_without_quorum_still_has_a_report(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    model = tiny_models["llama"]
    grid = FakeGrid({1: site("ann", model, "no disk"), 2: site("bob", model, "no <b>luck</b>")})
    with at_the_server(), pytest.raises(RoundError, match=r"ann: no disk; bob: .*safe"):
        server.run(grid, config(model, tmp_path))
    assert (tmp_path / "latest" / "report.html").is_file()
    assert not (tmp_path / "latest" / "adapter").exists()


def test_a_simulation_goes_on_with_as_many_sites_only(nodes: Nodes) -> None:
    """With another number each would get other rows."""
    first, _ = simulate(nodes, "a", run__rounds=1)
    keys = {"run__output_dir": str(first.parent), "run__resume": "latest", "run__rounds": 2}
    two = nodes.grid(*(nodes.simulated(at, of=2) for at in range(2)), **keys)
    with pytest.raises(ConfigError, match=r"3 simulated sites, .* got 2; set num-supernodes=3 in"):
        run(nodes, two, **keys)
    again, _ = simulate(nodes, "a", run__resume="latest", run__rounds=2)
    assert again == first
    assert [row["round"] for row in latest(first.parent) if row["kind"] == "round"] == [1, 2]


@pytest.mark.usefixtures("reports")
def test_refused_sites_are_in_the_metrics_and_the_report(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    model = tiny_models["llama"]
    bad = site("eve", model, "", base="another model")
    grid = FakeGrid({1: site("ann", model, "no disk"), 2: bad})
    with at_the_server(), pytest.raises(RoundError):
        server.run(grid, config(model, tmp_path))
    rows = [row for row in latest(tmp_path) if row["kind"] == "site"]
    assert [(row["site"], row["round"], row["status"]) for row in rows] == [("eve", 0, "refused")]
    page = html.unescape((tmp_path / "latest" / "report.html").read_text())
    assert "Expected site 'eve' to hold the server's base model" in page


def test_deployed_sites_are_not_partitioned(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    model = tiny_models["llama"]
    wrong = config(model, tmp_path, data__partition="natural")
    grid = FakeGrid({1: site("ann", model, "")})
    with at_the_server(), pytest.raises(ConfigError, match=r"data\.partition='own' .*ann"):
        server.run(grid, wrong)


def test_a_full_disk_under_the_adapter_says_that_rounds_are_safe(tmp_path: Path) -> None:
    said = r"All rounds are safe.*run\.resume='latest'"
    with pytest.raises(CheckpointError, match=said), server._room(tmp_path):
        raise OSError(28, "No space left on device")


def test_a_report_that_cannot_be_written_does_not_hide_what_ended_the_run(
    tiny_models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server, "write_report", full)
    model = tiny_models["llama"]
    grid = FakeGrid({1: site("ann", model, "no disk")})
    with at_the_server(), pytest.raises(RoundError, match="ann: no disk"):
        server.run(grid, config(model, tmp_path))
