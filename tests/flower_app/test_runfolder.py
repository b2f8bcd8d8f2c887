"""Run folders: what is written is whole, what was finished stays, and a full disk is survived."""

from __future__ import annotations

import json
import math
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flower_app.config import Config, Value, defaults, parse
from flower_app.runfolder import CheckpointError, RunFolder, replacing
from models.section import ConfigError
from tests.flower_app.checkpoints import checkpoint, config, one_round, resumed, same


def test_a_configuration_need_not_say_where_the_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLORILEGIUM_TEST_RUNS", str(tmp_path / "runs"))
    named = config(Path("$FLORILEGIUM_TEST_RUNS"))
    folder = RunFolder.create(named)
    assert folder.path.parent == tmp_path / "runs"
    assert str(tmp_path) not in (folder.path / "config.toml").read_text()
    again, _ = RunFolder.resume(config(Path("$FLORILEGIUM_TEST_RUNS"), run__resume="latest"))
    assert again.path == folder.path


def test_create_makes_a_folder_and_points_latest_at_it(tmp_path: Path) -> None:
    base = tmp_path / "made" / "on demand"
    first = RunFolder.create(config(base, run__name="a"))
    second = RunFolder.create(config(base, run__name="b"))
    third = RunFolder.create(config(base, run__name="b"))  # within the same second
    assert len({first.path, second.path, third.path}) == 3
    assert (base / "latest").is_symlink()
    assert os.readlink(base / "latest") == third.path.name  # relative: the folder can be moved
    stored = tomllib.loads((first.path / "config.toml").read_text(encoding="utf-8"))
    assert Config.model_validate(stored) == config(base, run__name="a")
    assert first.rows() == [] and not list(first.path.rglob("*.part"))


def test_a_home_folder_may_be_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder.create(parse(defaults())).path.parent == tmp_path / ".florilegium" / "runs"


def test_an_output_folder_that_is_none_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.output-dir.*'.*file'.*name another one"):
        RunFolder.create(config(tmp_path / "file"))
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run\.output-dir"):
        RunFolder.create(config(tmp_path / "runs"))


def test_resume_goes_on_after_the_last_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.log({"kind": "round", "round": 1})
    folder.save(checkpoint(1))
    folder.log({"kind": "round", "round": 2})
    folder.save(checkpoint(2))
    again, last = resumed(tmp_path)
    assert same(last, checkpoint(2))
    assert again.path == folder.path
    assert [row["round"] for row in again.rows()] == [1, 2]
    by_path, last = RunFolder.resume(config(tmp_path, run__resume=str(folder.path)))
    assert by_path.path == folder.path and same(last, checkpoint(2))


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    for round_ in range(1, 4):
        folder.save(checkpoint(round_))
    names = sorted(path.name for path in (folder.path / "checkpoint").iterdir())
    assert names == ["checkpoint.json", "round-00003.safetensors"]


def test_metrics_after_the_checkpoint_are_cut_off_on_resume(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.log({"round": 1, "site": "Zürich \u2028"})
    folder.save(checkpoint(1))
    folder.log({"round": 2, "site": "Zürich"})
    with folder.metrics.open("ab") as file:
        file.write(b'{"round": 2, "si')  # killed in mid-line
    again, _ = resumed(tmp_path)
    assert again.rows() == [{"round": 1, "site": "Zürich \u2028"}]
    again.log({"round": 2})
    assert [row["round"] for row in again.rows()] == [1, 2]


def test_resume_before_the_first_checkpoint_starts_the_rows_anew(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.log({"round": 1})
    again, last = resumed(tmp_path)
    assert last is None and again.rows() == []


@pytest.mark.parametrize("resume", ["latest", "elsewhere", "."])
def test_resume_of_nothing_is_refused(tmp_path: Path, resume: str) -> None:
    named = resume if resume == "latest" else str(tmp_path / resume)
    with pytest.raises(ConfigError, match=r"run\.resume.*config\.toml; leave it empty"):
        RunFolder.resume(config(tmp_path, run__resume=named))


def test_resume_of_another_configuration_names_every_difference(tmp_path: Path) -> None:
    RunFolder.create(config(tmp_path))
    with pytest.raises(ConfigError) as error:
        resumed(tmp_path, payload__rank=4, run__seed=1, train__batch_size=2)
    message = str(error.value)
    for part in ("payload.rank was 8 and is 4", "run.seed was 0 and is 1",
                 "train.batch-size was 8 and is 2", "leave run.resume empty"):  # fmt: skip
        assert part in message


def test_resume_lets_change_what_decides_no_bytes_and_writes_it_down(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.save(checkpoint(1))
    changes: dict[str, Value] = {
        "run__rounds": 9, "run__deadline_s": 5.0, "run__quorum": 1.0, "run__baselines": True,
        "run__name": "other", "run__tensorboard": True, "run__roll_call_s": 1.0,
        "split__listen": "0.0.0.0:9", "split__address": "b:9", "split__wait_s": 1.0,
        "split__stall_s": 1.0,
    }  # fmt: skip
    again, last = resumed(tmp_path, **changes)
    assert again.path == folder.path and same(last, checkpoint(1))
    stored = tomllib.loads((folder.path / "config.toml").read_text(encoding="utf-8"))
    assert stored["run"]["rounds"] == 9 and stored["run"]["name"] == "other"


def test_what_a_round_without_enough_sites_says_to_lower_can_be_lowered(tmp_path: Path) -> None:
    RunFolder.create(config(tmp_path, strategy__rule="krum", strategy__min_sites=3))
    resumed(tmp_path, strategy__rule="krum", strategy__min_sites=2, strategy__num_byzantine=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_rounds_change_the_bytes_under_a_schedule(tmp_path: Path, schedule: str) -> None:
    RunFolder.create(config(tmp_path, train__schedule=schedule))
    with pytest.raises(ConfigError, match=r"run\.rounds was 5 and is 9"):
        resumed(tmp_path, train__schedule=schedule, run__rounds=9)
    resumed(tmp_path, train__schedule=schedule)


def test_a_run_of_a_version_without_a_key_can_be_resumed_with_its_default(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    path = folder.path / "config.toml"
    path.write_text(path.read_text().replace("prox-mu = 0.0\n", ""))
    resumed(tmp_path)
    path.write_text(path.read_text().replace("prox-mu = 0.0\n", ""))
    with pytest.raises(ConfigError, match=r"train\.prox-mu was 0\.0 and is 0\.5"):
        resumed(tmp_path, train__prox_mu=0.5)


def test_nothing_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    kinds = {path.suffix for path in one_round(tmp_path).path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ".toml"}


NAMES = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "a\nb", "a\r\nb", 'a"b\\', "病院 🏥", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_names_with_any_characters_stay_on_their_line(tmp_path: Path, name: str) -> None:
    folder = RunFolder.create(config(tmp_path))
    rows: list[dict[str, Any]] = [
        {"site": name, "reason": name * 2},
        {"site": "b", "per_site": {name: {"loss": 1.0}}},
    ]
    for row in rows:
        folder.log(row)
    assert folder.rows() == rows
    folder.save(checkpoint(1))
    folder.log({"site": name})
    assert resumed(tmp_path)[0].rows() == rows


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans() | st.none())))
def test_rows_come_back_as_they_were_logged(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(b"")
    for row in rows:
        folder.log(row)
    assert folder.rows() == rows


def test_what_is_not_a_number_becomes_null(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.log({"a": math.nan, "b": {"c": math.inf, "d": 1.5}, "e": "NaN"})
    strict = json.loads(folder.metrics.read_text(), parse_constant=pytest.fail)
    assert strict == {"a": None, "b": {"c": None, "d": 1.5}, "e": "NaN"}


def test_logging_to_a_folder_that_is_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        RunFolder(tmp_path / "gone").log({"a": 1})


def test_replacing_keeps_the_old_folder_when_the_new_one_is_not_finished(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "new.txt").write_text("half")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old.txt"]
    with replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "new.txt").write_text("whole")
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_a_killed_process_left_half_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".adapter.part").mkdir()
    (tmp_path / ".adapter.part" / "junk").write_text("")
    with replacing(tmp_path / "adapter") as temporary:
        temporary.mkdir()
    assert list((tmp_path / "adapter").iterdir()) == []


def test_who_was_asked_outlives_a_crash(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    assert folder.asked() == []
    folder.note("train", 1, ["a", "b"])
    folder.note("train", 2, ["a"])
    with (folder.path / "asked.jsonl").open("ab") as file:
        file.write(b'\n{"kind": "tra')  # the power went
    again, last = RunFolder.resume(config(tmp_path, run__resume="latest"))
    again.rewind(config(tmp_path, run__resume="latest"), last)
    again.note("train", 2, ["a"])
    assert [(told["round"], told["sites"]) for told in again.asked()] == [
        (1, ["a", "b"]), (2, ["a"]), (2, ["a"]),
    ]  # fmt: skip
