"""A real SuperLink with three SuperNodes: the bytes of a simulation, and runs behind masks."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from flower_app.local import superlink, supernodes
from privacy.accounting import spent
from privacy.events import Event
from privacy.ledger import Ledger
from tests.nodekeys import write_keys
from tests.serverpaths import unnamed
from tests.system.runs import NAMES, Value, WholeRun, adapter_bytes, finish, run_app, site_rows


@dataclass(frozen=True)
class Federation:
    """Three sites with rows, models, keys and state of their own, connected to a SuperLink."""

    folder: Path

    def run(self, name: str, config: Mapping[str, Value]) -> tuple[Path, str]:
        """Train with all three; the run's folder and what `flwr run` said."""
        own = {"data.source": "embedded", "data.partition": "own", "strategy.min-sites": 3}
        there = dict(config) | own | self.paths(name)
        output = finish(run_app(self.folder / "flower", unnamed(there)))
        assert (self.folder / name / "latest" / "summary.json").is_file(), output
        for site in NAMES:
            assert str(self.folder / f"{site}.jsonl") not in output
        return self.folder / name / "latest", output

    def paths(self, run: str) -> dict[str, Value]:
        """Keys of a run that name a path of the server."""
        return {"run.output-dir": str(self.folder / run)}

    def state(self, site: str) -> Path:
        """What a site keeps."""
        return self.folder / f"state-{site}"


@pytest.fixture(scope="module")
def federation(
    tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    found = Federation(tmp_path_factory.mktemp("federation"))
    keys = found.folder / "keys"
    write_keys(keys, NAMES)
    nodes = []
    for name in NAMES:
        rows, model = found.folder / f"{name}.jsonl", found.folder / f"model-{name}"
        rows.write_text("".join(json.dumps(row) + "\n" for row in site_rows(name)))
        shutil.copytree(tiny_models["llama"], model)
        node = {"site": name, "data-path": str(rows), "model-path": str(model)}
        node |= {"key-path": str(keys / f"{name}.pem"), "peers-path": str(keys / "peers")}
        nodes.append(node | {"state-path": str(found.state(name))})
    home = found.folder / "flower"
    for run in ("plain", "secure"):  # the ServerApp's process has the variables of the SuperLink
        unnamed(found.paths(run) | {"model.name": str(tiny_models["llama"])})
    with superlink(home, simulation=False) as port, supernodes(home, port, nodes):
        yield found


def summary_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


def test_deployed_sites_train_the_same_bytes_as_simulated_ones(
    federation: Federation, whole_run: WholeRun
) -> None:
    run, output = federation.run("plain", whole_run.config)
    summary = summary_of(run)
    assert summary["mode"] == "deployment", output
    assert summary["sites"] == sorted(NAMES)
    # The model cards differ in nothing either: they name no path of either server.
    assert adapter_bytes(run.parent) == adapter_bytes(whole_run.folder)


def test_sites_add_noise_in_shares_behind_their_masks(
    federation: Federation, small_run: dict[str, Value]
) -> None:
    run, output = federation.run("secure", small_run | {
        "run.rounds": 1, "strategy.weighting": "uniform", "secure.aggregation": "masks",
        "privacy.unit": "client", "privacy.place": "distributed", "privacy.noise-multiplier": 2.0,
        "privacy.clip-norm": 0.1,
    })  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sites = [row for row in rows if row["kind"] == "site"]
    assert [(row["site"], row["status"]) for row in sites] == [(n, "ok") for n in NAMES], output
    assert all(row["loss_before"] is None for row in sites)

    summary = summary_of(run)
    size = 4 * summary["trainable_parameters"]
    assert all(row["bytes_up"] > size and row["bytes_down"] > size for row in sites)
    (round_,) = [row for row in rows if row["kind"] == "round"]
    # The noise of a sum of three is 0.2, far more than the clipped update.
    wanted = 0.2 / 3 * summary["trainable_parameters"] ** 0.5
    assert round_["update_norm"] == pytest.approx(wanted, rel=0.15)

    # Each site has written down what it released, before without noise, and keeps nothing of the
    # session.
    event = Event("discrete-gaussian", "client", 2.0, noise_at="sites", round=1)
    for name in NAMES:
        events = Ledger(federation.state(name) / "ledger.jsonl").events()
        (charged,) = [event for event in events if event.mechanism != "none"]
        assert (charged.site, charged.run) == (name, run.resolve().name)
        assert replace(charged, run="", site="", split="") == event
        assert not list(federation.state(name).rglob("session.json"))
    assert not list(run.parent.rglob("ledger.jsonl"))

    told = summary["privacy"]
    assert (summary["mode"], summary["secure_aggregation"]) == ("deployment", "masks")
    assert (told["unit"], told["epsilon"]) == ("client", pytest.approx(spent([event], 1e-5)))
    page = html.unescape((run / "report.html").read_text())
    card = (run / "adapter" / "README.md").read_text()
    assert "<dt>Secure aggregation</dt><dd>masks</dd>" in page
    assert "| Secure aggregation | `masks`:" in card
    assert f"Differential privacy: {told['text']}." in page
    assert f"Differential privacy: {told['text']}." in card
