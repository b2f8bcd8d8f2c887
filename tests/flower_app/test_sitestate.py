"""What a site keeps: found again by round, never half, never below another's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flower_app.config import Value, defaults, parse
from flower_app.node import NodeConfig
from flower_app.sitestate import SiteState, StateError, file_name, require_state_path, site_state
from models.section import ConfigError

SETTINGS: dict[str, Value] = {"privacy.unit": "record", "train.steps": 2}


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"personal": {"b": torch.full((2,), value), "a": torch.zeros(1)}}


def value_of(state: SiteState, round_: int) -> float | None:
    found = state.after(round_)
    return float(found["personal"]["b"][0]) if found else None


def test_the_newest_state_of_a_moment_is_found(tmp_path: Path) -> None:
    state = SiteState(tmp_path / "site", SETTINGS)
    assert state.after(7) == {}
    for round_ in (2, 3, 6):  # not every round asks every site
        state.save(round_, groups(round_))
    assert [value_of(state, at) for at in range(8)] == [None, None, 2, 3, 3, 3, 6, 6]
    assert list(state.after(6)["personal"]) == ["a", "b"]


def test_a_round_done_again_takes_the_place_of_all_that_came_after(tmp_path: Path) -> None:
    state = SiteState(tmp_path, SETTINGS)
    for round_ in (1, 2, 3):
        state.save(round_, groups(round_))
    state.save(2, groups(20))
    assert [value_of(state, at) for at in (1, 2, 3)] == [1, 20, 20]


def test_rounds_that_did_not_count_are_dropped_and_older_ones_kept(tmp_path: Path) -> None:
    state = SiteState(tmp_path, SETTINGS)
    for round_ in (1, 2):
        state.save(round_, groups(round_))
    for round_ in range(3, 8):  # none of these counted: the site goes on from round 2
        again = SiteState(tmp_path, SETTINGS)
        assert value_of(again, 2) == 2
        again.save(round_, groups(round_))
    assert [value_of(state, at) for at in (1, 2, 6, 7)] == [1, 2, 2, 7]


def test_state_that_is_gone_is_an_error_and_no_new_start(tmp_path: Path) -> None:
    state = SiteState(tmp_path, SETTINGS)
    for round_ in range(2, 9):
        state.save(round_, groups(round_))
    assert len(list(tmp_path.glob("round-*"))) == 3
    assert [value_of(state, at) for at in (0, 1, 6, 8)] == [None, None, 6, 8]
    with pytest.raises(StateError, match=r"after round 4 in .*only rounds 6 to 8; bring .*copy"):
        state.after(4)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"privacy.unit": "client"}, r"name, but privacy\.unit changed; set them back"),
        ({"privacy.unit": "none", "train.steps": 3}, r"privacy\.unit, train\.steps changed"),
    ],
)
def test_state_of_a_run_with_other_settings_is_not_taken_up(
    tmp_path: Path, now: dict[str, Value], said: str
) -> None:
    SiteState(tmp_path, SETTINGS).save(1, groups(1))
    for newer in ({}, {"privacy.place": "central"}):  # a key that came later, as it was unsaid
        assert value_of(SiteState(tmp_path, SETTINGS | newer), 1) == 1
    for round_ in (0, 1):
        with pytest.raises(ConfigError, match=said):
            SiteState(tmp_path, SETTINGS | now).after(round_)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(StateError, match=r"whole file .*settings\.json"):
        SiteState(tmp_path, SETTINGS).after(1)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    state = SiteState(tmp_path, SETTINGS)
    state.save(1, groups(1))
    whole = (tmp_path / "round-00001.safetensors").read_bytes()
    for spoilt in (b"", whole[: len(whole) - 3], b"\xff" * len(whole)):
        (tmp_path / "round-00001.safetensors").write_bytes(spoilt)
        with pytest.raises(StateError, match=r"whole file .*round-00001\.safetensors.*copy"):
            state.after(1)
        with pytest.raises(StateError, match="whole file"):
            state.save(2, groups(2))


def test_what_cannot_be_written_leaves_the_rounds_before(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder belongs")
    with pytest.raises(StateError, match=r"write the site's state.*free some space"):
        SiteState(tmp_path / "taken" / "site", SETTINGS).save(1, groups(1))


@pytest.mark.parametrize("name", ["north", "site-1", "A.b_c"])
def test_plain_names_stay(name: str) -> None:
    assert file_name(name) == name


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "/etc", "a/b", "é", "x" * 300, "\udcff"])
def test_other_names_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    safe = file_name(name)
    (tmp_path / safe).mkdir()
    assert (tmp_path / safe).parent == tmp_path and safe not in ("", ".", "..")
    assert file_name(f"{name}'") != safe


def test_a_deployed_site_keeps_to_its_own_folder(tmp_path: Path) -> None:
    node = NodeConfig(site="north", data_path="/rows", state_path=str(tmp_path))
    plan = {"run": "../../run", "state": "/of/the/server"}
    state = site_state(parse(defaults()), node, plan, "north")
    assert state.folder.parent.parent == tmp_path
    assert state.folder.name == "north"
    require_state_path(node, "payload.personal")


def test_a_deployed_site_without_a_folder_is_told_what_to_do() -> None:
    node = NodeConfig(site="north", data_path="/rows")
    with pytest.raises(ConfigError, match=r"'state-path'.*payload\.personal.*state-path='/"):
        require_state_path(node, "payload.personal")
