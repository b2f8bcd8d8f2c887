"""The whole run config: read from Flower's flat keys, checked as one, before anything is loaded."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from flower_app.data.config import DataConfig
from models.config import ModelConfig, PayloadConfig, TrainConfig
from models.section import ConfigError, Section, unknown
from models.split.config import SplitConfig
from privacy.config import PrivacyConfig
from privacy.secure.config import SecureConfig
from strategies.attacks.config import AttackConfig
from strategies.config import StrategyConfig

Value = bool | int | float | str


class RunConfig(Section):
    """`run.*`: the run as a whole."""

    rounds: int = Field(5, ge=1, description="Rounds to train.")
    seed: int = Field(0, ge=0, description="Seed of everything that is drawn at random.")
    name: str = Field(
        "florilegium", pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run and its folder."
    )
    output_dir: str = Field(
        "~/.florilegium/runs", min_length=1, description="Folder of the run folders, on the server."
    )
    resume: str = Field(
        "",
        description="Run folder to go on with after its last finished round, or `latest`; "
        "empty starts anew.",
    )
    deadline_s: float = Field(
        3600.0, gt=0, description="Seconds a round waits for replies before it goes on without."
    )
    roll_call_s: float = Field(
        120.0, gt=0, description="Seconds a newly seen site has to say who it is."
    )
    quorum: float = Field(
        0.5, gt=0, le=1, description="Share of the asked sites that must answer well in a round."
    )
    baselines: bool = Field(
        False,
        description="Also train each site alone and all data pooled, for comparison; "
        "simulation only.",
    )
    tensorboard: bool = Field(
        False, description="Write TensorBoard event files into the run folder."
    )


class Config(Section):
    """All sections of a run."""

    run: RunConfig
    model: ModelConfig
    payload: PayloadConfig
    data: DataConfig
    split: SplitConfig
    train: TrainConfig
    strategy: StrategyConfig
    privacy: PrivacyConfig
    secure: SecureConfig
    attack: AttackConfig

    def flat(self) -> dict[str, Value]:
        """All keys, dotted and in kebab case, with their resolved values."""
        nested = self.model_dump(by_alias=True)
        return {f"{s}.{key}": value for s, keys in nested.items() for key, value in keys.items()}

    @property
    def digest(self) -> str:
        """SHA-256 over all keys and values."""
        return hashlib.sha256(json.dumps(self.flat(), sort_keys=True).encode()).hexdigest()


def sections() -> dict[str, type[Section]]:
    """Section name to its type, in reading order."""
    found: dict[str, type[Section]] = {}
    for name, info in Config.model_fields.items():
        assert isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        found[name] = info.annotation
    return found


def known_keys() -> list[str]:
    """Every key that a run config may hold, dotted."""
    return [
        f"{section}.{info.alias}"
        for section, cls in sections().items()
        for info in cls.model_fields.values()
    ]


def defaults() -> dict[str, Value]:
    """Every key with its default, dotted, as pyproject.toml declares it: a base to build on."""
    return {
        f"{section}.{info.alias}": info.default
        for section, cls in sections().items()
        for info in cls.model_fields.values()
    }


def parse(flat: Mapping[str, Value]) -> Config:
    """Read flat dotted keys into sections; raises ConfigError that names all that is wrong.

    Every key must be given: Flower fills in what pyproject.toml declares, so a key that is missing
    was taken out there by mistake.
    """
    keys = known_keys()
    nested: dict[str, dict[str, Value]] = {section: {} for section in sections()}
    problems: list[str] = []
    for key, value in flat.items():
        if key in keys:
            section, name = key.split(".", 1)
            nested[section][name] = value
        else:
            problems.append(_unknown(key, keys))
    usual = defaults()
    problems += [_missing(key, usual[key]) for key in keys if key not in flat]
    try:
        config = Config.model_validate(nested)
    except ValidationError as error:
        raise ConfigError("\n".join(problems + [_explain(e) for e in error.errors()])) from None
    problems += _contradictions(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return _resolved(config)


def _resolved(config: Config) -> Config:
    """The config with `auto` decided where another section decides it.

    Products in bfloat16 round by the shape of the batch, so that a record moves the gradients of
    others, which no clipping bounds.
    """
    if config.privacy.unit == "record" and config.train.precision == "auto":
        exact = config.train.model_copy(update={"precision": "float32"})
        return config.model_copy(update={"train": exact})
    return config


def _unknown(key: str, keys: list[str]) -> str:
    section = key.partition(".")[0]
    if section not in sections():
        near = difflib.get_close_matches(key, keys, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"Unknown configuration key {key!r}.{hint} Sections: {', '.join(sections())}."
    own = [known for known in keys if known.startswith(f"{section}.")]
    return str(unknown("configuration key", key, own))


def _missing(key: str, default: Value) -> str:
    section, name = key.split(".", 1)
    return (
        f"Expected {key}, which is missing; write {name} = {json.dumps(default)} under "
        f"[tool.flwr.app.config.{section}] in pyproject.toml."
    )


def _explain(error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"])
    wish = re.sub(r"^\w+ should ", "", error["msg"])
    return f"Expected {key} to {wish}, got {error['input']!r}; change it."


def _contradictions(config: Config) -> list[str]:
    """What is wrong with settings that are each right by themselves, one message each."""
    found: list[str] = []
    checked = (config.payload, config.data, config.split, config.train, config.strategy)
    for section in (*checked, config.privacy, config.secure):
        try:
            section.check()
        except ConfigError as error:
            found.append(str(error))
    return found + list(_wrong_pairs(config))


# Rules that treat each number by itself, so that control variates stay means of gradients.
_SCAFFOLD_RULES = ("mean", "lora-mean", "median", "trimmed-mean")


def _wrong_with_scaffold(config: Config) -> Iterator[str]:
    """What keeps the server's control variate from being the mean of the sites'."""
    strategy = config.strategy
    wanted = {"weighting": "uniform", "server_optimizer": "none", "pre": ""}
    for name, value in wanted.items():
        if (got := getattr(strategy, name)) != value:
            key = name.replace("_", "-")
            yield (
                f"Expected strategy.{key}={value!r} with train.correction='scaffold', got {got!r}; "
                "the control variates must be plain means over the sites. Set it."
            )
    if strategy.rule not in _SCAFFOLD_RULES:
        yield (
            f"Expected strategy.rule to be one of {', '.join(_SCAFFOLD_RULES)} with "
            f"train.correction='scaffold', got {strategy.rule!r}; set one of them."
        )


def _wrong_pairs(config: Config) -> Iterator[str]:
    """What is wrong between sections."""
    if config.train.correction == "scaffold":
        yield from _wrong_with_scaffold(config)
    classification = config.model.task == "classification"
    if classification != (config.data.format == "classification"):
        yield (
            f"Expected model.task and data.format to agree, got task={config.model.task!r} with "
            f"format={config.data.format!r}; 'classification' goes with 'classification', "
            "'causal-lm' with 'text', 'instruct' or 'choice'."
        )
    if config.model.from_scratch and config.payload.kind != "full":
        yield (
            "Expected payload.kind='full' with model.from-scratch, got "
            f"{config.payload.kind!r}; random weights must travel whole to be trained."
        )
    if config.model.quantization != "none" and config.payload.kind == "full":
        yield (
            "Expected model.quantization='none' with payload.kind='full', got "
            f"{config.model.quantization!r}; quantised weights cannot be trained."
        )
    if config.payload.init == "text" and not config.payload.init_text:
        yield (
            "Expected payload.init-text with payload.init='text', got nothing; write the hard "
            "prompt to start from, or pick 'vocabulary'."
        )
    if config.train.packing == "on" and classification:
        yield (
            "Expected train.packing='off' or 'auto' with model.task='classification', got 'on'; a "
            "class label belongs to one document."
        )
    if config.attack.name != "none" and config.data.partition == "own":
        yield (
            f"Expected attack.name='none' with data.partition='own', got {config.attack.name!r}; "
            "attacks are for simulations, never for sites with rows of their own."
        )
    if config.attack.name != "none" and config.run.baselines:
        yield (
            f"Expected run.baselines=false with attack.name={config.attack.name!r}, got true; run "
            "the baselines without an attack."
        )
    if config.payload.kind == "split":
        yield from _wrong_with_split(config)
    elif config.split.noise:
        yield (
            f"Expected split.noise=0 with payload.kind={config.payload.kind!r}, got "
            f"{config.split.noise:g}, which is for the streams of 'split'; set "
            "payload.kind='split', or protect records or clients with privacy.unit."
        )
    if config.data.partition == "own":
        yield from _paths_that_travel(config)
    if config.run.baselines and config.data.partition == "own":
        yield (
            "Expected run.baselines=false with data.partition='own', got true; pooling needs the "
            "sites' rows in one place, which only a simulation has."
        )


def _wrong_with_split(config: Config) -> Iterator[str]:
    """What needs the whole model in one place, or promises what the stream would break."""
    wanted: dict[str, tuple[Value, Value]] = {
        "model.quantization": (config.model.quantization, "none"),
        "model.gradient-checkpointing": (config.model.gradient_checkpointing, False),
        "payload.site-ranks": (config.payload.site_ranks, ""),
        "train.correction": (config.train.correction, "none"),
        "train.ditto-lambda": (config.train.ditto_lambda, 0.0),
        "privacy.unit": (config.privacy.unit, "none"),
        "secure.aggregation": (config.secure.aggregation, "none"),
        "run.baselines": (config.run.baselines, False),
    }
    for key, (got, value) in wanted.items():
        if got != value:
            yield (
                f"Expected {key}={json.dumps(value)} with payload.kind='split', got {got!r}; "
                "set it, or train another payload."
            )
    if config.split.head == "soft-prompt":
        yield from _wrong_with_prompt(config)
    parts = {"head": config.split.head, "middle": config.split.middle, "tail": config.split.tail}
    for part, what in parts.items():
        if what == "full" and config.model.dtype != "float32":
            yield (
                f"Expected model.dtype='float32' with split.{part}='full', got "
                f"{config.model.dtype!r}, which would round small updates away; set it "
                "(train.precision may stay 'bfloat16')."
            )
    if config.train.packing == "on":
        yield (
            "Expected train.packing='off' or 'auto' with payload.kind='split', got 'on'; set it."
        )
    if config.strategy.trusts or config.strategy.rule in ("lora-exact", "lora-stack"):
        yield (
            "Expected a strategy.rule that needs no whole model at the server with "
            f"payload.kind='split', got {config.strategy.rule!r}; set 'lora-svd' or 'mean'."
        )


def _wrong_with_prompt(config: Config) -> Iterator[str]:
    """What would not be one adapter with a soft prompt in PEFT, or not one of a causal model."""
    wanted: dict[str, tuple[str, str]] = {
        "split.middle": (config.split.middle, "none"),
        "split.tail": (config.split.tail, "none"),
        "model.task": (config.model.task, "causal-lm"),
        "payload.options": (config.payload.options, ""),
    }
    for key, (got, value) in wanted.items():
        if got != value:
            yield (
                f"Expected {key}={value!r} with split.head='soft-prompt', got {got!r}, with which "
                "it is no adapter that PEFT knows; set it, or split.head='lora'."
            )


def _paths_that_travel(config: Config) -> Iterator[str]:
    """Paths of the server that deployed sites would read in the run config."""
    named = {
        "model.name": config.model.name,
        "data.source": config.data.source,
        "data.eval-source": config.data.eval_source,
        "strategy.root-source": config.strategy.root_source,
        "run.output-dir": config.run.output_dir,
        "run.resume": config.run.resume,
    }
    for key, value in named.items():
        if value.startswith(("/", ".")):
            yield (
                f"Expected no path of the server in {key} with data.partition='own', got "
                f"{value!r}, which every site would read in the run config; write {key}='$NAME' "
                "and set that variable where the SuperLink starts."
            )
