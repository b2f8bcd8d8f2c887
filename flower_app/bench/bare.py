"""The yardstick: a plain PyTorch loop in a process of one thread, without Flower.

Run as `python -m flower_app.bench.bare SPECIFICATION`: prepares everything, prints `ready`, waits
for a line on standard input, then trains and prints its timings as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flower_app import compose
from flower_app.config import Config, Value, parse
from flower_app.data.site import Simulation
from models.batches import Batch, Batches
from models.payload import Payload
from models.seeds import derive
from models.text import encode

ROOT = Path(__file__).resolve().parent.parent.parent
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Timing:
    """Seconds and tokens of each round in one process, and each site's loss in the first round."""

    seconds: list[float]
    tokens: list[int]
    losses: dict[str, float]


def run(
    flat: Mapping[str, Value], sites: int, processes: int, environment: Mapping[str, str]
) -> list[Timing]:
    """Train `sites` sites, dealt out to `processes` loops that start together.

    `flat` is laid over the app's own defaults, as `flwr run --run-config` does.
    """
    flat = {**_defaults(), **flat}
    with ExitStack() as stack:
        loops = [
            stack.enter_context(_loop(flat, sites, [number, processes], environment))
            for number in range(processes)
        ]
        for loop in loops:
            _expect(loop, "ready")
        for loop in loops:
            assert loop.stdin is not None
            loop.stdin.write("go\n")
            loop.stdin.flush()
        return [Timing(**json.loads(_expect(loop, "{"))) for loop in loops]


def _defaults() -> dict[str, Value]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    sections: dict[str, dict[str, Value]] = project["tool"]["flwr"]["app"]["config"]
    return {f"{name}.{key}": v for name, keys in sections.items() for key, v in keys.items()}


def _loop(
    flat: Mapping[str, Value], sites: int, part: list[int], environment: Mapping[str, str]
) -> subprocess.Popen[str]:
    specification = json.dumps({"config": dict(flat), "sites": sites, "part": part})
    return subprocess.Popen(
        [sys.executable, "-m", "flower_app.bench.bare", specification],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, **THREADS},
    )


def _expect(loop: subprocess.Popen[str], start: str) -> str:
    assert loop.stdout is not None
    for line in loop.stdout:
        if line.startswith(start):
            return line
    raise RuntimeError(f"Expected a line {start!r}... of a bare loop, but it ended; see above.")


def _prepare(
    config: Config, num_sites: int, part: tuple[int, int]
) -> tuple[Payload, dict[str, list[list[Batch]]]]:
    """Model and batches as a worker of the simulation has them: site -> round -> batches."""
    base = compose.load_base(config)
    packs = compose.packs(config, base)
    payload = compose.attach(config, base)
    simulation = Simulation(config.data, num_sites, config.run.seed)
    number, parts = part
    batches: dict[str, list[list[Batch]]] = {}
    for name in list(simulation.parts)[number::parts]:
        encoded = encode(simulation.site(name).train, base.tokenizer, config.train.max_length)
        stream = Batches(
            encoded.examples,
            batch_size=config.train.batch_size,
            seed=derive(config.run.seed, "order", name),
            pad_id=int(base.tokenizer.pad_token_id or 0),
            packing=packs,
            max_length=config.train.max_length,
        )
        steps = config.train.steps
        batches[name] = [list(stream.take(r * steps, steps)) for r in range(config.run.rounds)]
    return payload, batches


def _train_site(
    payload: Payload, start: Mapping[str, torch.Tensor], batches: Sequence[Batch], config: Config
) -> float:
    """The loop that people write by hand; returns the mean loss."""
    payload.load(start)
    module, parameters = payload.module, list(payload.parameters.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.train.learning_rate, weight_decay=0.0, fused=True
    )
    total = torch.zeros(())
    for batch in batches:
        loss = module(**batch.inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
    return float(total) / len(batches)


def main() -> None:
    """One process; see the module's docstring."""
    torch.set_num_threads(1)
    specification: dict[str, Any] = json.loads(sys.argv[1])
    config = parse(specification["config"])
    payload, batches = _prepare(config, specification["sites"], tuple(specification["part"]))
    start = payload.select()
    payload.module.train()
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # whoever started this loop is gone
    timing = Timing([], [], {})
    for round_ in range(config.run.rounds):
        began = time.perf_counter()
        losses = {
            name: _train_site(payload, start, rounds[round_], config)
            for name, rounds in batches.items()
        }
        timing.seconds.append(time.perf_counter() - began)
        timing.tokens.append(sum(b.tokens for rounds in batches.values() for b in rounds[round_]))
        timing.losses.update(losses if round_ == 0 else {})
    print(json.dumps(asdict(timing)), flush=True)


if __name__ == "__main__":
    main()
