"""Names become stages; unknown names and options list the choices."""

from __future__ import annotations

import inspect
import re

import pytest

from models.section import ConfigError
from strategies.config import StrategyConfig
from strategies.registry import PRE, RULES, SERVER_OPTIMIZERS, build, compose, options_of


def test_build_chains_what_the_configuration_names() -> None:
    assert build(StrategyConfig()).name == "mean+none"
    config = StrategyConfig(pre=" clip ,", server_optimizer="adam", server_learning_rate=0.1)
    rule = build(config)
    assert rule.name == "clip+mean+adam"
    assert set(rule.init(3)) == {"adam/m", "adam/v"}


def test_build_hands_each_stage_its_settings() -> None:
    config = StrategyConfig(server_optimizer="adagrad", server_tau=0.5)
    assert build(config).init(1)["adagrad/v"].item() == 0.25


@pytest.mark.parametrize("name", sorted(SERVER_OPTIMIZERS))
def test_every_optimizer_builds_from_the_defaults(name: str) -> None:
    assert build(StrategyConfig(server_optimizer=name)).name == f"mean+{name}"


@pytest.mark.parametrize("name", sorted(PRE))
def test_every_stage_before_the_rule_builds_from_the_defaults(name: str) -> None:
    assert build(StrategyConfig(pre=name)).name == f"{name}+mean+none"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StrategyConfig(rule="meen"), "Unknown strategy.rule 'meen'. Did you mean 'mean'"),
        (StrategyConfig(rule="Mean"), "Unknown strategy.rule 'Mean'"),
        (StrategyConfig(pre="clip,klip"), "Unknown strategy.pre 'klip'.*Choices: .*clip"),
        (StrategyConfig(pre="clip,clip"), "got 'clip' twice"),
        (
            StrategyConfig(server_optimizer="sgd"),
            "Unknown strategy.server-optimizer 'sgd'.*adagrad, adam, momentum, none, yogi",
        ),
    ],
)
def test_unknown_names_list_the_choices(config: StrategyConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_nrm": 1.0}, r"'clip_nrm'. Did you mean 'clip_norm'\?.*server_beta2, .*server_tau"),
        ({"tau": 1.0}, "Unknown option of clip, mean, adam: 'tau'"),
        ({}, "Expected the option 'clip_norm', which is missing"),
        ({"clip_norm": 0.0}, "Expected a valid clip_norm, got 0.0: .*greater than 0"),
        ({"clip_norm": float("nan")}, "Expected a valid clip_norm, got nan"),
        ({"clip_norm": "1"}, "Expected a valid clip_norm, got '1'"),
        ({"clip_norm": True}, "Expected a valid clip_norm, got True"),
        ({"clip_norm": 1.0, "server_beta2": 1.0}, "Expected a valid server_beta2, got 1.0"),
        ({"clip_norm": 1.0, "server_tau": 0}, "Expected a valid server_tau, got 0"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("mean", ["clip"], "adam", options)


def test_option_of_a_stage_that_takes_none() -> None:
    with pytest.raises(ConfigError, match="Expected no options for mean, none, got 'f'; leave it"):
        compose("mean", options={"f": 1})


def test_names_are_kebab_case_and_stages_bear_them() -> None:
    for name in [*PRE, *RULES, *SERVER_OPTIMIZERS]:
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name)
    for name in RULES:
        assert build(StrategyConfig(rule=name)).name == f"{name}+none"
    for name, optimizer in SERVER_OPTIMIZERS.items():
        assert optimizer().name == name


def test_options_are_keyword_only_annotated_and_configurable() -> None:
    fields = set(StrategyConfig.model_fields)
    for table in (PRE, RULES, SERVER_OPTIMIZERS):
        for name, factory in table.items():
            assert inspect.getdoc(factory), name
            for option in inspect.signature(factory).parameters.values():
                assert option.kind is option.KEYWORD_ONLY, (name, option)
                assert option.annotation is not option.empty, (name, option)
    for pre in PRE:
        for optimizer in SERVER_OPTIMIZERS:
            assert options_of("mean", [pre], optimizer) <= fields
    for rule in RULES:
        assert options_of(rule) <= fields
