"""The folder of a run: config, metrics, checkpoints; written so that a crash loses no finished round."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w
from safetensors.torch import load_file, save_file
from torch import Tensor

from flower_app.config import Config
from models.section import ConfigError

# Keys that may change between a run and its continuation: none of them decides the bytes of a round.
_FREE = ("resume", "rounds", "deadline-s", "roll-call-s", "quorum", "name", "output-dir",
         "baselines", "tensorboard")  # fmt: skip
_FREE_KEYS = frozenset(f"run.{key}" for key in _FREE)


class CheckpointError(OSError):
    """A checkpoint that could not be written or read."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after a finished round: payload and strategy tensors by name."""

    round: int
    payload: dict[str, Tensor]
    state: dict[str, Tensor]
    facts: dict[str, str]


class RunFolder:
    """`<output-dir>/<time>-<name>/` with everything that a run leaves behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.adapter = path / "adapter"
        self._checkpoints = path / "checkpoint"

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Make a new run folder, write its config.toml and point `latest` at it."""
        base = Path(config.run.output_dir).expanduser().absolute()
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{config.run.name}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            path = _first_free(base, stem)
        except OSError as error:
            raise ConfigError(
                f"Expected run.output-dir to be a folder that can be written, got {str(base)!r} "
                f"({error.strerror}); name another one."
            ) from error
        folder = cls(path)
        folder._checkpoints.mkdir()
        folder.metrics.touch()
        with replacing(path / "config.toml") as temporary:
            temporary.write_text(tomli_w.dumps(config.model_dump(by_alias=True)))
        _point(base / "latest", path)
        return folder

    @classmethod
    def resume(cls, config: Config) -> tuple[RunFolder, Checkpoint | None]:
        """Open the run folder that `run.resume` names, at its last finished round if there is one.

        Raises ConfigError when there is no such run or its configuration was another one.
        """
        named = Path(config.run.resume).expanduser()
        if config.run.resume == "latest":
            named = Path(config.run.output_dir).expanduser() / "latest"
        path = named.resolve()
        if not (path / "config.toml").is_file():
            raise ConfigError(
                f"Expected run.resume to name a run folder, got {str(named)!r} without a "
                "config.toml; leave it empty to start anew."
            )
        _compare(config, tomllib.loads((path / "config.toml").read_text()))
        folder = cls(path)
        return folder, folder._last()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics.read_text().split("\n") if line]

    def save(self, checkpoint: Checkpoint) -> None:
        """Make `checkpoint` the one to resume from; on failure the one before stays.

        Raises CheckpointError, for instance when the disk is full.
        """
        name = f"round-{checkpoint.round:05d}.safetensors"
        tensors = {f"payload/{key}": value for key, value in checkpoint.payload.items()}
        tensors |= {f"state/{key}": value for key, value in checkpoint.state.items()}
        pointer = {
            "round": checkpoint.round,
            "file": name,
            "metrics_bytes": self.metrics.stat().st_size,
            "facts": checkpoint.facts,
        }
        try:
            with replacing(self._checkpoints / name) as temporary:
                save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
            with replacing(self._checkpoints / "checkpoint.json") as temporary:
                temporary.write_text(json.dumps(pointer, indent=1))
        except Exception as error:  # safetensors reports a full disk as an error of its own
            raise CheckpointError(
                f"Expected to write the checkpoint of round {checkpoint.round} to "
                f"{str(self._checkpoints)!r}, but: {error}. The rounds before it are safe: free "
                "some space and run again with run.resume='latest'."
            ) from error
        for old in self._checkpoints.glob("round-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def _last(self) -> Checkpoint | None:
        try:
            pointer = json.loads((self._checkpoints / "checkpoint.json").read_text())
        except FileNotFoundError:
            os.truncate(self.metrics, 0)
            return None
        tensors = load_file(self._checkpoints / pointer["file"])
        # Rows of a round that was cut short are written again when it is repeated.
        os.truncate(self.metrics, pointer["metrics_bytes"])
        return Checkpoint(
            pointer["round"], _under("payload/", tensors), _under("state/", tensors),
            pointer["facts"],
        )  # fmt: skip


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path`, file or folder, once it is whole."""
    temporary = path.with_name(f".{path.name}.part")
    _remove(temporary)
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            _sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        _remove(temporary)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _compare(config: Config, before: Mapping[str, Mapping[str, Any]]) -> None:
    stored = {f"{s}.{key}": value for s, keys in before.items() for key, value in keys.items()}
    changed = [
        f"{key} was {stored.get(key)!r} and is {value!r}"
        for key, value in config.flat().items()
        if key not in _FREE_KEYS and stored.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"Expected the configuration of the run to resume, but {'; '.join(changed)}; set "
            "these back, or leave run.resume empty to start anew."
        )
