"""Texts on flwr's command lines, and what the quickstart does with its arguments."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st

from flower_app import quickstart
from flower_app.local import flwr_run, quoted
from models.section import ConfigError


def after(command: list[str], option: str) -> list[str]:
    return [command[command.index(option) + 1]]


def test_settings_arrive_at_flower_as_they_were_given(tmp_path: Path) -> None:
    settings: dict[str, bool | int | float | str] = {
        "payload.init-text": "Answer the patient's question",
        "run.output-dir": "~/o'brien/my runs",
        "data.template": 'Ask "{prompt}" here: \\n x=1',
        "model.name": r"C:\models $BASE",
        "data.labels": "größer,kleiner\tgleich",
        "run.baselines": True,
        "run.rounds": 3,
        "train.learning-rate": 0.002,
    }
    command = flwr_run(tmp_path, tmp_path, settings, federation={"backend": "it's"})
    assert parse_config_args(after(command, "--run-config")) == settings
    assert parse_config_args(after(command, "--federation-config")) == {"backend": "it's"}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_arrives_whole_or_is_refused(text: str) -> None:
    try:
        written = quoted(text)
    except ConfigError:
        assert '"' in text
        return
    assert parse_config_args([f"a.b=1 a.text={written} a.c=2"]) == {
        "a.b": 1, "a.text": text, "a.c": 2
    }  # fmt: skip


def test_a_text_with_both_quotes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"both kinds of quotes.*TOML file"):
        quoted('the patient\'s "why"')
    with pytest.raises(SystemExit, match=r"both kinds of quotes"):
        quickstart.main(['payload.init-text=the patient\'s "why"'])


def test_the_quickstart_finds_the_run_where_the_app_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path / "mine"))
    for given_, found in (("~/runs", tmp_path / "runs"), ("$RUNS", tmp_path / "mine")):
        assert quickstart._folder({"run.output-dir": given_}) == found / "latest"
    resumed = {"run.output-dir": "/elsewhere", "run.resume": "$RUNS/some-run"}
    assert quickstart._folder(resumed) == tmp_path / "mine" / "some-run"


def test_a_stopped_quickstart_goes_on_with_what_it_was_given() -> None:
    arguments = ["--sites", "8", "run.rounds=9", "payload.init-text=Two words"]
    for given_, wanted in (
        (arguments, [*arguments, "run.resume=latest"]),
        ([*arguments, "run.resume=x"], [*arguments, "run.resume=x"]),
        ([], ["run.resume=latest"]),
    ):
        said = quickstart.how_to_go_on(given_)
        command = said.removeprefix("Stopped. Finished rounds are kept: ").removesuffix(" goes on.")
        assert shlex.split(command) == ["./scripts/quickstart", *wanted]
