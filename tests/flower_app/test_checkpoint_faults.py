"""Checkpoints that a crash, a full disk or a damaged file gets in the way of."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flower_app import runfolder
from flower_app.runfolder import Checkpoint, CheckpointError, RunFolder
from tests.flower_app.checkpoints import FACTS, checkpoint, config, one_round, resumed, same

ROOT = Path(runfolder.__file__).resolve().parent.parent
STEPS = ["save_file", "replace", "fsync", "write_text"]


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("stopped", [True, False])
def test_a_crash_between_any_two_steps_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, times: int, stopped: bool
) -> None:
    """Raise in the `times`-th call of `step`; Ctrl-C is no Exception and passes the handler."""
    folder = RunFolder.create(config(tmp_path))
    folder.log({"round": 1})
    folder.save(checkpoint(1))
    folder.log({"round": 2})
    calls = 0
    error: BaseException = KeyboardInterrupt() if stopped else OSError(5, "Input/output error")

    def failing(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == times:
                raise error
            return original(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        if step == "save_file":
            patch.setattr(runfolder, "save_file", failing(save_file))
        elif step == "write_text":
            patch.setattr(Path, "write_text", failing(Path.write_text))
        else:
            patch.setattr(os, step, failing(getattr(os, step)))
        expected = KeyboardInterrupt if stopped else CheckpointError
        raised = None
        try:
            folder.save(checkpoint(2))
        except (CheckpointError, KeyboardInterrupt) as caught:
            raised = caught
        assert isinstance(raised, expected) if calls >= times else raised is None
    again, last = resumed(tmp_path)
    assert last is not None
    assert same(last, checkpoint(last.round))
    assert last.round == 2 or calls >= times
    assert [row["round"] for row in again.rows()] == list(range(1, last.round + 1))
    again.log({"round": last.round + 1})
    again.save(checkpoint(last.round + 1))
    assert same(resumed(tmp_path)[1], checkpoint(last.round + 1))


def fill(folder: RunFolder) -> list[str]:
    """Save a large round and log many rows; what was said of the room that they did not find."""
    said = []
    big = {"model.a": torch.ones(60_000, 2)}
    try:
        folder.save(Checkpoint(2, big, {}, FACTS))
    except CheckpointError as error:
        said.append(str(error))
    try:
        for _ in range(4000):
            folder.log({"round": 2, "text": "x" * 100})
    except CheckpointError as error:
        said.append(str(error))
    return said


def assert_survived(refusals: list[str], base: Path) -> None:
    assert len(refusals) == 2, refusals
    assert "checkpoint of round 2" in refusals[0] and "metrics.jsonl" in refusals[1]
    for line in refusals:
        assert "The rounds before it are safe: free some space and run again with " in line
        assert "run.resume='latest'" in line
    again, last = resumed(base)
    assert same(last, checkpoint(1))
    assert again.rows() == [{"round": 1}]
    assert not list(again.path.rglob("*.part"))


# In a process of its own, which alone sees the full disk.
_FILL = """
import shutil, sys
from pathlib import Path
from flower_app.runfolder import RunFolder
from tests.flower_app.test_checkpoint_faults import fill
print(*fill(RunFolder(Path(sys.argv[1]))), sep="\\n")
shutil.copytree(sys.argv[1], sys.argv[2])
"""


def test_a_file_that_may_not_grow_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    folder = one_round(tmp_path / "runs")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        refusals = fill(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_survived(refusals, tmp_path / "runs")


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    folder = one_round(tmp_path / "runs")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    # A file system of 100 kB in a mount namespace of its own, gone with the process.
    alone = ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=100k tmpfs '{disk}'"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*alone, "sh", "-c", mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine does not let a test mount a file system of its own")
    script = f'{mount} && cp -r "$0" "{disk}/run" && exec "$@"'
    output = subprocess.run(
        [*alone, "sh", "-c", script, str(folder.path), sys.executable, "-c", _FILL,
         str(disk / "run"), str(kept)],
        cwd=ROOT, text=True, capture_output=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    assert "No space left" in output.stdout
    shutil.rmtree(folder.path)
    shutil.copytree(kept, folder.path)
    assert_survived(output.stdout.splitlines(), tmp_path / "runs")


@pytest.mark.parametrize("damage", ["cut", "gone", "pointer", "keys", "metrics", "no metrics"])
def test_a_damaged_checkpoint_is_an_error_with_a_remedy(tmp_path: Path, damage: str) -> None:
    folder = one_round(tmp_path)
    pointer = folder.path / "checkpoint" / "checkpoint.json"
    tensors = folder.path / "checkpoint" / "round-00001.safetensors"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif damage == "gone":
        tensors.unlink()
    elif damage == "pointer":
        pointer.write_text('{"round": 1,')
    elif damage == "keys":
        pointer.write_text("{}")
    elif damage == "metrics":
        folder.metrics.write_text("")
    else:
        folder.metrics.unlink()
    with pytest.raises(
        CheckpointError, match=r"Expected a whole checkpoint in .*leave run\.resume"
    ):
        resumed(folder.path.parent)
