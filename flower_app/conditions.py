"""Conditions under which a guarantee holds: what a configuration that asks for it may not do."""

from __future__ import annotations

from flower_app.config import Config
from flower_app.node import NodeConfig
from models.section import ConfigError


def check_records(config: Config) -> None:
    """Refuse what would leave a site beside its noisy sums, or mix its records.

    Raises ConfigError.
    """
    if config.train.packing == "on":
        raise ConfigError(
            "Expected train.packing='off' or 'auto' with privacy.unit='record', got 'on'; packed "
            "records share their gradients."
        )
    if config.train.ditto_lambda:
        raise ConfigError(
            "Expected train.ditto-lambda=0 with privacy.unit='record', got "
            f"{config.train.ditto_lambda:g}; personal models train without noise and their scores "
            "would leave. Keep part of the payload at the sites instead (payload.personal)."
        )
    if config.run.baselines and config.privacy.metrics != "exact":
        raise ConfigError(
            "Expected privacy.metrics='exact' with run.baselines=true, got "
            f"{config.privacy.metrics!r}; baselines train and are scored without noise. Set it in "
            "a simulation with public rows, or run.baselines=false."
        )
    if config.data.eval_source:
        _check_apart(config, "data.eval-source")


def _check_apart(config: Config, given: str) -> None:
    """Refuse one epsilon for training and held-out rows that may be the same."""
    if config.privacy.metrics == "noised" and config.privacy.epsilon:
        raise ConfigError(
            "Expected privacy.noise-multiplier and privacy.metrics-noise-multiplier with "
            f"privacy.metrics='noised' and held-out rows of their own ({given}), got "
            f"privacy.epsilon={config.privacy.epsilon:g}; a record may be in both, so that what "
            "they spend adds up. Set those, or leave scores at the sites."
        )


def check_node(config: Config, node: NodeConfig) -> None:
    """Refuse what does not fit the node: at a deployed site, what only a simulation may do.

    Raises ConfigError.
    """
    if config.privacy.unit == "record" and node.eval_path:
        _check_apart(config, "eval-path")
    if node.simulated:
        return
    privacy = config.privacy
    checks = (
        (config.attack.name == "none", "attack.name='none'", config.attack.name),
        (privacy.noise_source == "secure", "privacy.noise-source='secure'", privacy.noise_source),
        (privacy.metrics != "exact", "privacy.metrics='withheld' or 'noised'", privacy.metrics),
    )
    for holds, expected, got in checks:
        if not holds:
            raise ConfigError(
                f"Expected {expected} at a deployed site, got {got!r}, which is for simulations "
                "only; set it."
            )
