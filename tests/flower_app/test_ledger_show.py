"""`./scripts/ledger show`: what is spent, what remains, and by what."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from flower_app.ledger import main
from privacy.accounting import spent
from privacy.events import Event
from privacy.ledger import Ledger

ROUND = Event("gaussian", "record", 1.25, 0.1, 10, run="first", round=1, site="north")
CENTRAL = Event("gaussian", "client", 2.0, run="first", round=1, noise_at="server")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of a simulation, with ledgers of two sites and of the server."""
    folder = tmp_path / "runs" / "first"
    for site, rounds in (("north", 3), ("south", 1)):
        own = Ledger(folder / "sites" / site / "ledger.jsonl")
        own.append([replace(ROUND, round=r + 1, site=site) for r in range(rounds)])
    Ledger(tmp_path / "runs" / "ledger.jsonl").append([CENTRAL])
    return folder


def test_all_ledgers_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line[0] != " "] == [
        "Server", "north", "south",
    ]  # fmt: skip
    north = printed.split("north: ")[1].split("south: ")[0]
    found = re.search(r"epsilon ([\d.]+) per record \(delta 1e-05, zero-out, accountant PLD", north)
    assert found
    assert float(found[1]) == pytest.approx(spent([ROUND] * 3, 1e-5), rel=0.01)
    assert re.search(r"first +gaussian +record +training +1.25 +Poisson 0.1 +30 +1-3", north)
    assert "per client" in printed.split("north: ")[0]
    assert "assumes    the server adds the noise" in printed


def test_what_remains_of_a_policy(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("max-epsilon = 9.0\ndelta = 1e-6", encoding="utf-8")
    ledger = run / "sites" / "north" / "ledger.jsonl"
    assert main(["show", "--ledger", str(ledger), "--policy", str(policy)]) == 0
    printed = capsys.readouterr().out
    left = 9.0 - spent([ROUND] * 3, 1e-6)
    found = re.search(r"remaining  ([\d.]+) of epsilon 9 \(max-epsilon\)", printed)
    assert found
    assert float(found[1]) == pytest.approx(left, rel=0.01)
    assert "delta 1e-06" in printed


def test_what_a_ledger_cannot_know_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epsilon holds as long as nothing left beside it; without one there is nothing to hold."""
    assert main(["show", "--run", str(run)]) == 0
    server, north = capsys.readouterr().out.split("north: ")
    assert "assumes    no site took part in runs without noise, which the server's ledg" in server
    assert re.search(
        r"assumes    nothing of these rows left without noise before this ledger began "
        r"\(run 'first', round 1\), nor while the site named no state-path", north,
    )  # fmt: skip
    kept = Ledger(tmp_path / "state" / "ledger.jsonl")
    kept.append([Event("none", "record", run="plain", site="north"), ROUND])
    assert main(["show", "--ledger", str(kept.path)]) == 0
    printed = capsys.readouterr().out
    assert "epsilon infinite" in printed and "before this ledger began" not in printed


def test_a_changed_ledger_is_not_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = run / "sites" / "north" / "ledger.jsonl"
    ledger.write_text(ledger.read_text("utf-8").replace("1.25", "9.25", 1), "utf-8")
    assert main(["show", "--ledger", str(ledger)]) == 2
    shown = capsys.readouterr()
    assert "line 1 does not continue" in shown.err
    assert "epsilon" not in shown.out


def test_no_ledger_is_an_error_that_says_where_it_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "--run", str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert f"got none at {tmp_path}/ledger.jsonl" in told and "state-path" in told
    with pytest.raises(SystemExit):
        main(["show"])
