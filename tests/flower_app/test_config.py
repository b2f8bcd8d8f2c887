"""The run config: what is wrong is refused, all at once; what is right survives a round trip."""

from __future__ import annotations

import math
import re
import tomllib
import typing
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from flower_app.config import Config, Value, defaults, known_keys, parse, sections
from models.section import ConfigError
from tests.serverpaths import KEYS


def refused(**changes: Value | None) -> str:
    """The message for the defaults with `section__key` changed; None takes the key out."""
    flat: dict[str, Value] = defaults()
    for name, value in changes.items():
        key = name.replace("__", ".").replace("_", "-")
        if value is None:
            del flat[key]
        else:
            flat[key] = value
    with pytest.raises(ConfigError) as error:
        parse(flat)
    return str(error.value)


def test_defaults_are_a_whole_and_coherent_config() -> None:
    assert list(defaults()) == known_keys()
    assert parse(defaults()).flat() == defaults()


@pytest.mark.parametrize("key", known_keys())
def test_each_key_is_needed(key: str) -> None:
    flat = defaults()
    del flat[key]
    with pytest.raises(ConfigError) as error:
        parse(flat)
    section, name = key.split(".", 1)
    message = str(error.value)
    assert message.startswith(f"Expected {key}, which is missing; write {name} = ")
    assert f"[tool.flwr.app.config.{section}]" in message
    assert "\n" not in message
    # The remedy is what it says: that line, read as TOML, is the default.
    line = re.search(rf"write ({re.escape(name)} = .*) under \[", message)
    assert line and tomllib.loads(line[1]) == {name: defaults()[key]}


def test_unknown_key_lists_the_choices_of_its_section_only() -> None:
    message = refused(payload__rnak=4)
    assert "Unknown configuration key 'payload.rnak'. Did you mean 'payload.rank'?" in message
    listed = set(message.partition("Choices: ")[2].rstrip(".").split(", "))
    assert listed == {key for key in known_keys() if key.startswith("payload.")}


@pytest.mark.parametrize("key", ["trian.steps", "steps", "", ".", "Run.rounds"])
def test_key_of_an_unknown_section_lists_the_sections(key: str) -> None:
    with pytest.raises(ConfigError, match="Unknown configuration key") as error:
        parse({**defaults(), key: 1})
    named = str(error.value)
    assert repr(key) in named
    assert named.endswith(".") and "train.weight-decay" not in named
    for section in sections():
        assert section in named


def test_snake_case_is_not_another_name_for_a_key() -> None:
    with pytest.raises(ConfigError, match=r"'train.batch_size'. Did you mean 'train.batch-size'"):
        parse({**defaults(), "train.batch_size": 4})


def _wrong_type(value: Value) -> Value:
    return 1 if isinstance(value, str) else "text"


@pytest.mark.parametrize("key", known_keys())
def test_a_value_of_another_type_is_refused_with_its_key(key: str) -> None:
    wrong = _wrong_type(defaults()[key])
    with pytest.raises(ConfigError) as error:
        parse({**defaults(), key: wrong})
    first = str(error.value).split("\n")[0]
    assert first.startswith(f"Expected {key} to ") and first.endswith(f"got {wrong!r}; change it.")


@pytest.mark.parametrize(
    ("key", "value", "wish"),
    [
        ("run.rounds", 0, "be greater than or equal to 1"),
        ("run.rounds", True, "be a valid integer"),
        ("run.rounds", 2.0, "be a valid integer"),
        ("run.quorum", 1.5, "be less than or equal to 1"),
        ("run.quorum", math.nan, "be"),
        ("run.name", "../elsewhere", "match pattern"),
        ("run.name", "", "match pattern"),
        ("run.baselines", 1, "be a valid boolean"),
        ("model.task", "causal", "be 'causal-lm' or 'classification'"),
        ("model.name", "", "have at least 1 character"),
        ("payload.rank", 0, "be greater than or equal to 1"),
        ("data.eval-fraction", 1.0, "be less than 1"),
        ("data.alpha", math.nan, "be greater than 0"),
        ("train.learning-rate", -1e-3, "be greater than 0"),
        ("train.learning-rate", math.nan, "be greater than 0"),
        ("strategy.fraction", 0.0, "be greater than 0"),
        ("strategy.max-update-norm", math.nan, "be greater than 0"),
    ],
)
def test_a_value_out_of_bounds_says_what_was_expected(key: str, value: Value, wish: str) -> None:
    pattern = f"^Expected {re.escape(key)} to {re.escape(wish)}.*, got {re.escape(repr(value))};"
    with pytest.raises(ConfigError, match=pattern):
        parse({**defaults(), key: value})


def test_an_integer_stands_for_a_float() -> None:
    config = parse({**defaults(), "train.learning-rate": 1})
    assert type(config.train.learning_rate) is float


INCOHERENT: list[tuple[dict[str, Value], str]] = [
    ({"train__steps": 0}, "set the other to 0"),
    ({"train__epochs": 1.0}, "set the other to 0"),
    ({"data__partition": "sizes"}, "write for example '0.5,0.3,0.2'"),
    ({"data__partition": "sizes", "data__sizes": "0.9,0.9"}, "sum to at most 1"),
    ({"data__partition_column": ""}, "name the column"),
    ({"strategy__server_learning_rate": 0.5}, "pick 'momentum'"),
    ({"model__task": "classification"}, "goes with 'classification'"),
    ({"data__format": "classification"}, "goes with 'classification'"),
    ({"model__from_scratch": True}, "must travel whole"),
    ({"model__quantization": "int4", "payload__kind": "full"}, "cannot be trained"),
    ({"payload__init": "text"}, "pick 'vocabulary'"),
    (
        {"train__packing": "on", "model__task": "classification", "data__format": "classification"},
        "belongs to one document",
    ),
    ({"run__baselines": True, "data__partition": "own"}, "only a simulation has"),
    (
        {"model__name": "/srv/m", "data__partition": "own"},
        "path of the server in model.name with",
    ),
    ({"run__output_dir": "./r", "data__partition": "own"}, "write run.output-dir='$NAME'"),
    ({"attack__name": "ipm", "data__partition": "own"}, "never for sites with rows of their own"),
    ({"attack__name": "ipm", "run__baselines": True}, "run the baselines without an attack"),
]


@pytest.mark.parametrize(("changes", "remedy"), INCOHERENT)
def test_settings_that_contradict_each_other_are_refused(
    changes: dict[str, Value], remedy: str
) -> None:
    message = refused(**changes)
    assert message.startswith("Expected ") and ", got " in message and remedy in message
    assert len(message.split("\n")) == 1


def test_everything_that_is_wrong_is_named_at_once() -> None:
    message = refused(
        run__rounds=0,
        model__nmae="x",
        data__labels=None,
        strategy__clip_norm=None,
        train__steps="5",
    )
    assert len(message.split("\n")) == 5
    for part in ("run.rounds", "'model.nmae'", "data.labels", "strategy.clip-norm", "train.steps"):
        assert part in message


def test_contradictions_are_named_at_once_and_beside_missing_keys() -> None:
    message = refused(
        train__steps=0, model__from_scratch=True, payload__init="text", run__name=None
    )
    assert len(message.split("\n")) == 4


def test_sections_are_frozen() -> None:
    config = parse(defaults())
    with pytest.raises(ValueError, match="frozen"):
        config.run.rounds = 7  # type: ignore[misc]


def _values(info: FieldInfo) -> st.SearchStrategy[Any]:
    """Values that a field takes by itself."""
    if typing.get_origin(info.annotation) is typing.Literal:
        return st.sampled_from(typing.get_args(info.annotation))
    if info.annotation is str:
        return st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    if info.annotation is bool:
        return st.booleans()
    bounds = {
        name: getattr(rule, name)
        for rule in info.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(rule, name)
    }
    if info.annotation is int:
        return st.integers(bounds.get("ge", 0), bounds.get("le", 2**40))
    return st.floats(
        bounds.get("ge", bounds.get("gt", 0.0)),
        bounds.get("le", bounds.get("lt", 1e9)),
        exclude_min="gt" in bounds,
        exclude_max="lt" in bounds,
    )


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Value]:
    flat: dict[str, Value] = {}
    for section, cls in sections().items():
        for info in cls.model_fields.values():
            flat[f"{section}.{info.alias}"] = draw(_values(info))
    # What cannot be drawn freely, because it must agree with another key or a pattern.
    task = draw(st.sampled_from(["causal-lm", "classification"]))
    flat["model.task"] = task
    flat["data.format"] = (
        task if task == "classification" else draw(st.sampled_from(["text", "instruct", "choice"]))
    )
    by_steps = draw(st.booleans())
    flat["train.steps"], flat["train.epochs"] = (7, 0.0) if by_steps else (0, 1.5)
    flat["train.packing"] = draw(st.sampled_from(["auto", "off"]))
    flat["data.sizes"] = "0.5,0.25"
    flat["run.baselines"] = False
    if flat["data.partition"] == "own":
        flat["attack.name"] = "none"
        flat |= {key: f"$NAMED{flat[key]}" for key in KEYS}  # by a variable, not by a path
    flat["run.name"] = draw(st.from_regex(r"[A-Za-z0-9._-]+", fullmatch=True))
    flat["payload.site-ranks"] = draw(st.sampled_from(["", "1", " 1,1"]))
    flat["payload.kind"], flat["model.quantization"] = "full", "none"
    flat |= {"split.noise": 0.0, "split.clip-norm": 0.0, "split.clip-gradient": 0.0}
    if flat["train.correction"] == "scaffold":
        flat |= {"train.optimizer": "sgd", "train.prox-mu": 0.0, "strategy.pre": ""}
        flat |= {"strategy.weighting": "uniform", "strategy.rule": "mean"}
        flat["strategy.server-optimizer"] = "none"
    if flat["strategy.server-optimizer"] == "none":
        flat["strategy.server-learning-rate"] = 1.0
    private = flat["privacy.unit"] != "none"
    flat["privacy.epsilon"], flat["privacy.noise-multiplier"] = (
        (0.0, 1.1) if private else (0.0, 0.0)
    )
    noised = flat["privacy.metrics"] == "noised"
    flat["privacy.metrics-noise-multiplier"] = 2.5 if noised else 0.0
    if flat["secure.aggregation"] == "none":
        flat["secure.groups"] = 1
    if flat["privacy.unit"] != "client":
        flat["privacy.place"] = "central"
    if flat["privacy.unit"] != "client" or flat["privacy.place"] != "central":
        flat["privacy.clipping"], flat["privacy.noise"] = "fixed", "independent"
    if flat["privacy.clipping"] == "adaptive":
        flat["privacy.noise"] = "independent"
    return flat


@settings(max_examples=40, deadline=None)
@given(configs())
def test_flat_then_parse_is_the_same_config(flat: dict[str, Value]) -> None:
    config = parse(flat)
    if flat["privacy.unit"] == "record" and flat["train.precision"] == "auto":
        flat |= {"train.precision": "float32"}  # below it, records move each other's gradients
    assert config.flat() == flat
    assert parse(config.flat()) == config
    # And by way of the config.toml of a run folder.
    nested = tomllib.loads(tomli_w.dumps(config.model_dump(by_alias=True)))
    assert Config.model_validate(nested) == config


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from(known_keys()), min_size=1, max_size=12))
def test_every_missing_key_is_named(gone: set[str]) -> None:
    flat = {key: value for key, value in defaults().items() if key not in gone}
    with pytest.raises(ConfigError) as error:
        parse(flat)
    lines = str(error.value).split("\n")
    assert sorted(line.split()[1].rstrip(",") for line in lines) == sorted(gone)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"privacy.epsilon": 3.0}, "privacy.unit='none', got epsilon=3"),
        ({"privacy.unit": "record"}, "exactly one of privacy.epsilon and"),
        (
            {
                "privacy.unit": "client",
                "privacy.epsilon": 3.0,
                "privacy.noise-multiplier": 1.0,
            },
            "got epsilon=3 and noise-multiplier=1",
        ),
    ],
)
def test_privacy_wants_one_target(keys: dict[str, Value], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(defaults() | keys)
