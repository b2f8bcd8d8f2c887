"""The folder of a run: config, metrics, checkpoints; a crash loses no finished round."""

from __future__ import annotations

import json
import math
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flower_app.config import Config, Value, defaults
from models.disk import sync
from models.paths import located
from models.section import ConfigError

# Keys that may change between a run and its continuation: none of them decides the bytes of a round
# (run.rounds does under a schedule, which stretches over all of them).
_FREE = ("resume", "rounds", "deadline-s", "roll-call-s", "quorum", "name", "output-dir",
         "baselines", "tensorboard")  # fmt: skip
_SAFE = "The rounds before it are safe: free some space and run again with run.resume='latest'."
# A run that stopped for want of sites is told to lower one of these.
_LOWERED = {"strategy.min-sites", "strategy.num-byzantine"}
# Where the middle of a split model is and how long it waits; a new server may be elsewhere.
_STREAM = {"split.listen", "split.address", "split.wait-s", "split.stall-s"}
_FREE_KEYS = frozenset({f"run.{key}" for key in _FREE} | _LOWERED | _STREAM)


class CheckpointError(OSError):
    """A checkpoint that could not be written or read."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after a finished round: payload, strategy and fold tensors by name.

    `beside` is what the server trained itself, the middle of a split model.
    """

    round: int
    payload: dict[str, Tensor]
    state: dict[str, Tensor]
    facts: dict[str, str]
    metrics_bytes: int = 0
    fold: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)


class RunFolder:
    """`<output-dir>/<time>-<name>/` with everything that a run leaves behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self._questions = path / "asked.jsonl"
        self.adapter = path / "adapter"
        self.sites = path / "sites"
        self._checkpoints = path / "checkpoint"

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Make a new run folder, write its config.toml and point `latest` at it."""
        base = located(config.run.output_dir).absolute()
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{config.run.name}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            folder = cls(_first_free(base, stem))
            folder._checkpoints.mkdir()
            folder.metrics.touch()
            folder._write_config(config)
            _point(base / "latest", folder.path)
        except OSError as error:
            raise ConfigError(
                f"Expected run.output-dir to be a folder that can be written, got {str(base)!r} "
                f"({error}); name another one, or free some space."
            ) from error
        return folder

    @classmethod
    def resume(cls, config: Config) -> tuple[RunFolder, Checkpoint | None]:
        """Open the run folder that `run.resume` names, at its last finished round if there is one.

        Raises ConfigError when there is no such run or its configuration was another one, and
        CheckpointError when its checkpoint cannot be read.
        """
        named = located(config.run.resume)
        if config.run.resume == "latest":
            named = located(config.run.output_dir) / "latest"
        path = named.resolve()
        if not (path / "config.toml").is_file():
            raise ConfigError(
                f"Expected run.resume to name a run folder, got {str(named)!r} without a "
                "config.toml; leave it empty to start anew."
            )
        _compare(config, tomllib.loads((path / "config.toml").read_text(encoding="utf-8")))
        folder = cls(path)
        return folder, folder._last()

    def rewind(self, config: Config, checkpoint: Checkpoint | None) -> None:
        """Drop the rows after `checkpoint`, which are written again, and store `config`."""
        # Only once nothing can refuse the run any more: a finished one keeps its results till then.
        os.truncate(self.metrics, checkpoint.metrics_bytes if checkpoint else 0)
        self._write_config(config)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl, null for what is not finite, which JSON cannot say.

        Raises CheckpointError, for instance on a full disk.
        """
        line = json.dumps(_without_nan(row), ensure_ascii=False) + "\n"
        # A lone surrogate, which has no UTF-8, stays as the escape that it came from.
        _append(self.metrics, line.encode("utf-8", "backslashreplace"))

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        # Not splitlines(), which also splits at the U+2028 that JSON allows within a string.
        lines = self.metrics.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines if line]

    def note(self, kind: str, round_: int, sites: Sequence[str]) -> None:
        """Add whom a message of a kind is about to go to; unlike rows, this is never dropped again.

        Raises CheckpointError, for instance on a full disk.
        """
        # Whatever a crash tore is a line of its own: its messages were never sent.
        line = "\n" + json.dumps({"kind": kind, "round": round_, "sites": list(sites)})
        _append(self._questions, line.encode())
        sync(self._questions)

    def asked(self) -> list[dict[str, Any]]:
        """What `note` was told since the run began, rounds that were done twice included."""
        text = self._questions.read_bytes() if self._questions.exists() else b""
        found = []
        for line in filter(None, text.split(b"\n")):
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def save(self, checkpoint: Checkpoint) -> None:
        """Make `checkpoint` the one to resume from; on failure the one before stays.

        Raises CheckpointError, for instance when the disk is full.
        """
        name = f"round-{checkpoint.round:05d}.safetensors"
        tensors = {f"payload/{key}": value for key, value in checkpoint.payload.items()}
        tensors |= {f"state/{key}": value for key, value in checkpoint.state.items()}
        tensors |= {f"fold/{key}": value for key, value in checkpoint.fold.items()}
        tensors |= {f"beside/{key}": value for key, value in checkpoint.beside.items()}
        try:
            sync(self.metrics)
            pointer = {
                "round": checkpoint.round,
                "file": name,
                "metrics_bytes": self.metrics.stat().st_size,
                "facts": checkpoint.facts,
            }
            with replacing(self._checkpoints / name) as temporary:
                save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
            with replacing(self._checkpoints / "checkpoint.json") as temporary:
                temporary.write_text(json.dumps(pointer, indent=1), encoding="utf-8")
        except Exception as error:  # safetensors reports a full disk as an error of its own
            raise CheckpointError(
                f"Expected to write the checkpoint of round {checkpoint.round} to "
                f"{str(self._checkpoints)!r}, but: {error}. {_SAFE}"
            ) from error
        for old in self._checkpoints.glob("round-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def _write_config(self, config: Config) -> None:
        with replacing(self.path / "config.toml") as temporary:
            temporary.write_text(tomli_w.dumps(config.model_dump(by_alias=True)), encoding="utf-8")

    def _last(self) -> Checkpoint | None:
        try:
            pointer = json.loads((self._checkpoints / "checkpoint.json").read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise self._unreadable(error) from error
        try:
            tensors = load_file(self._checkpoints / pointer["file"])
            if self.metrics.stat().st_size < pointer["metrics_bytes"]:
                raise ValueError("metrics.jsonl is shorter than it was")
            return Checkpoint(
                pointer["round"], _under("payload/", tensors), _under("state/", tensors),
                pointer["facts"], pointer["metrics_bytes"], _under("fold/", tensors),
                _under("beside/", tensors),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"Expected a whole checkpoint in {str(self._checkpoints)!r}, but: {error!r}; bring the "
            "folder back from a copy, or leave run.resume empty to start anew."
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path`, file or folder, once it is whole."""
    temporary = path.with_name(f".{path.name}.part")
    _remove(temporary)
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        _remove(temporary)


def _append(path: Path, text: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(text)
    except OSError as error:
        raise CheckpointError(
            f"Expected to write to {str(path)!r}, but: {error}. {_SAFE}"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _first_free(base: Path, stem: str) -> Path:
    number = 1
    while True:
        path = base / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lasting(config: Config) -> dict[str, Value]:
    """The keys that stay as they are when a run is resumed, dotted, with their values."""
    free = _FREE_KEYS if config.train.schedule == "constant" else _FREE_KEYS - {"run.rounds"}
    return {key: value for key, value in config.flat().items() if key not in free}


def changes(before: Mapping[str, Any], now: Mapping[str, Value]) -> dict[str, tuple[Any, Value]]:
    """What keys were `before`, and are in `now`, where that differs."""
    # A run of an older version may lack a newer key.
    stored: dict[str, Any] = {**defaults(), **before}
    return {k: (stored.get(k), value) for k, value in now.items() if stored.get(k) != value}


def _compare(config: Config, before: Mapping[str, Mapping[str, Any]]) -> None:
    stored = {f"{s}.{key}": value for s, keys in before.items() for key, value in keys.items()}
    changed = [
        f"{key} was {was!r} and is {value!r}"
        for key, (was, value) in changes(stored, lasting(config)).items()
    ]
    if changed:
        raise ConfigError(
            f"Expected the configuration of the run to resume, but {'; '.join(changed)}; set "
            "these back, or leave run.resume empty to start anew."
        )
