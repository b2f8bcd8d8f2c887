"""For comparison, in simulation: each site alone, and all data pooled, with as many steps."""

from __future__ import annotations

from collections.abc import Mapping
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor

from flower_app import compose
from flower_app.config import Config
from flower_app.recorder import Recorder, read_score, score_fields
from flower_app.roster import Member
from flower_app.runfolder import RunFolder
from flower_app.worker import train_round
from models.batches import Batches
from models.evaluate import Score
from models.payload import Payload
from strategies.cohort import Cohort
from strategies.messages import Scalar, collect, config_of, to_record

MESSAGE = "train.baseline"
POOLED = ""  # no site has an empty name


def run_baselines(
    grid: Grid,
    config: Config,
    members: Mapping[str, Member],
    recorder: Recorder,
    folder: RunFolder,
    initial: Mapping[str, Tensor],
) -> None:
    """Train the baselines at the simulation's workers and log a row for each."""
    log(INFO, "Baselines: all data pooled, and each of %d sites alone.", len(members))
    arrays = to_record(initial)
    nodes = {name: member.node_id for name, member in members.items()}
    jobs = {POOLED: min(nodes.values()), **nodes}
    messages = []
    for name, node in jobs.items():
        plan = ConfigRecord({"site": name})
        content = RecordDict({"arrays": arrays, "plan": plan})
        messages.append(Message(content, node, MESSAGE, group_id=f"baseline {name}"))
    timeout = config.run.deadline_s * config.run.rounds
    for reply in collect(grid, messages, timeout):
        _log(recorder, folder, reply)


def train_alone(config: Config, payload: Payload, batches: Batches, name: str, steps: int) -> None:
    """Train the loaded payload as a federation of one: the same rounds, steps and optimisers."""
    stage, layout = compose.alone(config), payload.layout
    state, generator = stage.init(layout.size), torch.Generator()
    base_D = layout.flatten(payload.select())
    for round_ in range(1, config.run.rounds + 1):
        train_round(config, payload, batches, name or "all sites", round_, steps)
        change_D = layout.flatten(payload.select()) - base_D
        cohort = Cohort.of(layout, base_D, {name: change_D})
        delta, state = stage.apply(state, cohort, generator)
        base_D = base_D + delta.vector_D
        payload.load(layout.unflatten(base_D))


def report(scores: Mapping[str, Score], own: str) -> dict[str, Scalar]:
    """What a worker says of a baseline: its score on all held-out rows, and on its own."""
    fields: dict[str, Scalar] = {"site": own}
    fields |= score_fields("all", sum(scores.values(), Score()))
    if own:
        fields |= score_fields("own", scores[own])
    return fields


def _log(recorder: Recorder, folder: RunFolder, reply: Message) -> None:
    record = ConfigRecord() if reply.has_error() else config_of(reply.content, "report")
    fields = {k: v for k, v in record.items() if isinstance(v, (bool, int, float, str))}
    if reply.has_error() or "error" in fields:
        reason = reply.error.reason if reply.has_error() else fields["error"]
        log(WARNING, "A baseline failed: %s", reason)
        return
    site = str(fields["site"])
    row: dict[str, Any] = {"kind": "baseline", "name": "local" if site else "central"}
    score = read_score("all", fields)
    row |= recorder.score(score)
    if site:
        own = recorder.score(read_score("own", fields))
        row |= {"site": site} | {f"own_{key}": value for key, value in own.items()}
    folder.log(row)
    log(INFO, "Baseline %s: loss %.4f", site or "pooled", score.loss)
