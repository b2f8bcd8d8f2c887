"""The ledger: killed, torn, edited, shared by two processes, on a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from privacy import ledger as module
from privacy.accounting import spent
from privacy.events import Event
from privacy.ledger import Ledger, LedgerError

ROOT = Path(__file__).resolve().parents[2]
FIRST = Event("gaussian", "record", 1.2, 0.1, 50, run="a", round=1, site="north")
SECOND = Event("gaussian", "record", 0.9, 0.02, 200, run="b", round=1, site="north")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.jsonl"


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs `code` with the ledger module at hand."""
    head = (
        "import sys, os\nfrom pathlib import Path\n"
        "from privacy.events import Event\nfrom privacy.ledger import Ledger, LedgerError\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "event = lambda n: Event('gaussian', 'record', 1.0, round=n, run=str(os.getpid()))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_new_ledger_is_empty_and_writes_nothing(path: Path) -> None:
    assert Ledger(path).events() == []
    Ledger(path).append([])
    assert not path.parent.exists()


def test_events_stay_across_runs_and_restarts(path: Path) -> None:
    Ledger(path).append([FIRST])
    Ledger(path).append([SECOND, SECOND])
    again = Ledger(path)
    assert again.events() == [FIRST, SECOND, SECOND]
    joint = spent([FIRST, SECOND, SECOND], 1e-5)
    assert again.spent("record", 1e-5) == joint
    assert again.remaining("record", 1e-5, joint + 2.0) == pytest.approx(2.0)
    assert again.remaining("record", 1e-5, joint - 0.1) == 0.0
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    told = {"mechanism", "unit", "relation", "sample_rate", "count", "run", "round", "site"}
    assert all(told <= set(line) and "delta" not in line for line in lines)


def test_a_line_torn_by_a_crash_is_left_out_and_written_over(path: Path) -> None:
    Ledger(path).append([FIRST])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert Ledger(path).events() == [FIRST]
    Ledger(path).append([SECOND])
    assert Ledger(path).events() == [FIRST, SECOND]
    assert path.read_bytes().startswith(whole)


def test_a_first_line_torn_by_a_crash_is_left_out(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"line": 1, "mech')
    Ledger(path).append([FIRST])
    assert Ledger(path).events() == [FIRST]


def edited(path: Path) -> None:
    path.write_text(path.read_text("utf-8").replace("0.9", "9.9"), "utf-8")


def last_line_gone(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def last_line_torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def middle_line_gone(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])


def lines_swapped(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[1] + lines[0] + lines[2])


def line_forged(path: Path) -> None:
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[0])


def garbage_in_the_middle(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b"\nzzz\n", 1))


def another_kind_of_value(path: Path) -> None:
    path.write_bytes(b"[]\n" + path.read_bytes())


def begun_anew(path: Path) -> None:
    kept = Ledger(path.with_name("other.jsonl"))
    kept.append([FIRST, FIRST, FIRST])
    kept.path.replace(path)


def head_edited(path: Path) -> None:
    path.with_name("ledger.jsonl.head").write_text('{"lines": 3, "chain": "00"}', "utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edited, "line 2 does not continue"),
        (last_line_gone, "3 lines were written and 2 are there"),
        (last_line_torn, "3 lines were written and 2 are there"),
        (middle_line_gone, "line 2 does not continue"),
        (lines_swapped, "line 1 does not continue"),
        (line_forged, "line 4 does not continue"),
        (garbage_in_the_middle, "line 2 cannot be read"),
        (another_kind_of_value, "line 1 cannot be read"),
        (begun_anew, "line 3 is not the one that was written"),
        (head_edited, "line 3 is not the one that was written"),
        (lambda path: path.unlink(), "3 lines were written and 0 are there"),
        (lambda path: path.with_name("ledger.jsonl.head").unlink(), "ledger.jsonl.head is gone"),
        (
            lambda path: path.with_name("ledger.jsonl.head").write_bytes(b"{"),
            "ledger.jsonl.head cannot be read",
        ),
    ],
)
def test_a_changed_ledger_is_refused(
    path: Path, change: Callable[[Path], object], said: str
) -> None:
    Ledger(path).append([FIRST, SECOND, FIRST])
    change(path)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(LedgerError, match=rf"(?s){said}.*bring the file and its .head back"):
        Ledger(path).events()
    with pytest.raises(LedgerError, match=said):
        Ledger(path).append([SECOND])
    assert (path.read_bytes() if path.exists() else None) == before


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(path: Path) -> None:
    for _ in range(3):
        before = len(Ledger(path).events())
        child = started(
            "for n in range(10**6):\n    ledger.append([event(n)] * 3)\n    print(n, flush=True)\n",
            path,
        )
        assert child.stdout is not None
        for line in child.stdout:  # killed somewhere within one of the next writes
            if line == "7\n":
                break
        child.send_signal(signal.SIGKILL)
        acknowledged = 8 + len(child.stdout.read().splitlines())
        assert child.wait() == -signal.SIGKILL
        there = len(Ledger(path).events()) - before
        assert 3 * acknowledged <= there <= 3 * acknowledged + 3
        Ledger(path).append([FIRST])
        assert Ledger(path).events()[-1] == FIRST


def test_a_line_on_disk_counts_though_the_process_died_before_its_head(path: Path) -> None:
    Ledger(path).append([FIRST])
    child = started(
        "ledger._write_head = lambda *_: os.kill(os.getpid(), 9)\nledger.append([event(1)])\n",
        path,
    )
    assert child.wait() == -signal.SIGKILL
    events = Ledger(path).events()
    assert len(events) == 2
    assert events[0] == FIRST
    Ledger(path).append([SECOND])
    assert Ledger(path).events()[2] == SECOND


def test_append_returns_only_when_the_disk_has_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: list[int] = []
    monkeypatch.setattr(module.os, "fsync", lambda fd: nodes.append(os.fstat(fd).st_ino))
    Ledger(path).append([FIRST])
    line, folder = path.stat().st_ino, path.parent.stat().st_ino
    assert nodes.index(line) < len(nodes) - 1 - nodes[::-1].index(folder)
    assert path.parent.parent.stat().st_ino in nodes  # the folder was new as well


def test_events_that_the_disk_refused_are_not_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger(path).append([FIRST])
    whole, real = path.read_bytes(), os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(LedgerError, match=r"No space left.*Nothing was released: free some space"):
        Ledger(path).append([SECOND])
    monkeypatch.undo()
    assert path.read_bytes() == whole
    assert Ledger(path).events() == [FIRST]


def test_a_disk_that_fills_up_within_a_line_leaves_a_whole_ledger(path: Path) -> None:
    Ledger(path).append([FIRST])
    whole = path.read_bytes()
    child = started(
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try:\n    ledger.append([event(1)])\nexcept LedgerError as error:\n    print(error)\n",
        path, len(whole) + 100,
    )  # fmt: skip
    output, errors = child.communicate()
    assert "Nothing was released" in output, errors
    assert path.read_bytes() == whole
    Ledger(path).append([SECOND])
    assert Ledger(path).events() == [FIRST, SECOND]


def test_two_processes_at_once_lose_nothing(path: Path) -> None:
    code = "for n in range(25):\n    ledger.append([event(n)])\n"
    children = [started(code, path) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    events = Ledger(path).events()
    assert len(events) == 50
    for child in children:
        mine = [event.round for event in events if event.run == str(child.pid)]
        assert mine == list(range(25))


def test_a_budget_is_checked_while_nobody_else_can_spend_it(path: Path) -> None:
    def check(past: list[Event], new: Sequence[Event]) -> None:
        if len(past) + len(new) > 5:
            raise ValueError("over")

    refusals: list[ValueError] = []

    def spend() -> None:
        try:
            Ledger(path).append([FIRST], check)
        except ValueError as error:
            refusals.append(error)

    threads = [threading.Thread(target=spend) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refusals) == 7
    assert len(Ledger(path).events()) == 5


def test_a_ledger_that_another_process_keeps_is_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_S", 0.1)
    ledger = Ledger(path)
    ledger.append([FIRST])
    with ledger._locked(), pytest.raises(LedgerError, match=r"within 0.1 s, but another process"):
        Ledger(path).append([SECOND])
    Ledger(path).append([SECOND])
    assert len(Ledger(path).events()) == 2


def test_a_name_without_utf8_is_written(path: Path) -> None:
    odd = Event("gaussian", "record", 1.0, site="n\udcffrth")
    Ledger(path).append([odd])
    assert Ledger(path).events() == [odd]
