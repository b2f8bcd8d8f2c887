"""Checkpoints of run folders, written and taken up again, for the tests of both."""

from __future__ import annotations

from pathlib import Path

import torch

from flower_app.config import Config, Value, defaults, parse
from flower_app.runfolder import Checkpoint, RunFolder

FACTS = {"layout": "l", "base": "b"}


def config(base: Path, **changes: Value) -> Config:
    flat = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return parse({**defaults(), "run.output-dir": str(base), **flat})


def checkpoint(round_: int, size: int = 5) -> Checkpoint:
    payload = {"model.a": torch.full((size, 2), float(round_)), "b": torch.tensor(0.5)}
    state = {"adam/m": torch.arange(3.0) + round_, "adam/v": torch.zeros(0)}
    return Checkpoint(round_, payload, state, FACTS)


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    return (
        one is not None
        and (one.round, one.facts) == (other.round, other.facts)
        and one.payload.keys() == other.payload.keys()
        and one.state.keys() == other.state.keys()
        and all(torch.equal(one.payload[k], other.payload[k]) for k in one.payload)
        and all(torch.equal(one.state[k], other.state[k]) for k in one.state)
    )


def resumed(base: Path, **changes: Value) -> tuple[RunFolder, Checkpoint | None]:
    again = config(base, run__resume="latest", **changes)
    folder, last = RunFolder.resume(again)
    folder.rewind(again, last)
    return folder, last


def one_round(base: Path) -> RunFolder:
    """A run folder below `base` after its first round."""
    folder = RunFolder.create(config(base))
    folder.log({"round": 1})
    folder.save(checkpoint(1))
    return folder
