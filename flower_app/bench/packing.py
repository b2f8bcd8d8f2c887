"""Packed against padded batches, in useful tokens per second.

Both ways take training steps with LoRA on the same instruct rows, by the app's own loop, in turn,
in one process of one thread. Useful tokens are those that are not padding.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flower_app.bench.bases import DEFAULT, SMALL, Shape, save_base
from flower_app.bench.output import Outcome, Progress, table
from flower_app.data import embedded
from flower_app.data.config import DataConfig
from flower_app.data.format import make_records
from flower_app.data.source import load_rows
from models import attention, base, payload
from models.batches import Batches
from models.config import ModelConfig, PayloadConfig, TrainConfig
from models.payload import Payload
from models.text import Document, Example, Instruct, Record, encode
from models.train import train

ALPACA = Path(__file__).resolve().parents[3] / "shared" / "data" / "alpaca" / "train.jsonl.gz"
TARGET = 2.0
MAX_LENGTH = 512
ROWS = {"padded": 8, "packed": 4}
"""Rows per batch: examples when padded, packed rows of MAX_LENGTH else; about as many tokens."""


@dataclass(frozen=True)
class Pace:
    """One stretch of training steps."""

    useful_per_s: float
    tokens_per_s: float
    useful_share: float


def measure(quick: bool) -> Outcome:
    """Alternate stretches of padded and packed steps; medians over the stretches."""
    say = Progress()
    stretches, tokens = (3, 15_000) if quick else (5, 60_000)
    records, source = _records(4000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = [_compare(s, records, stretches, tokens, say) for s in (SMALL, DEFAULT)]
    finally:
        torch.set_num_threads(threads)
    results = [{**result, "source": source} for result in results]
    return Outcome(_text(results, source), results)


def _records(count: int) -> tuple[Sequence[Record], str]:
    """Instruct records of Alpaca where it is at hand, else of the embedded rows."""
    if ALPACA.is_file():
        rows = load_rows(str(ALPACA), "train")
        config = DataConfig(format="instruct", input_column="input")
        return make_records(rows.select(range(min(count, len(rows)))), config, ()), "alpaca"
    texts = [row["text"].partition("\n") for row in embedded.rows()]
    return [Instruct(head, rest) for head, _, rest in texts if rest][:count], "embedded rows"


def _compare(
    shape: Shape, records: Sequence[Record], stretches: int, tokens: int, say: Progress
) -> dict[str, Any]:
    say(f"{shape.name} model ...")
    attached, examples = _prepare(shape, records)
    streams = {way: _batches(examples, way) for way in ROWS}
    paces: dict[str, list[Pace]] = {way: [] for way in ROWS}
    at = dict.fromkeys(ROWS, 0)
    for stretch in range(stretches + 1):
        for way, batches in streams.items():
            steps = _steps(batches, at[way], tokens)
            pace = _stretch(attached, batches, at[way], steps)
            at[way] += steps
            if stretch:  # the first one warms up
                paces[way].append(pace)
                say(f"  {way}: {pace.useful_per_s:.0f} useful tokens/s over {steps} steps")
    median = {
        way: {
            name: statistics.median(getattr(pace, name) for pace in done)
            for name in ("useful_per_s", "tokens_per_s", "useful_share")
        }
        for way, done in paces.items()
    }
    return {
        "model": shape.name,
        "examples": len(examples),
        "mean_length": statistics.mean(len(example.input_ids) for example in examples),
        "max_length": MAX_LENGTH,
        "median": median,
        "ratio": median["packed"]["useful_per_s"] / median["padded"]["useful_per_s"],
        "runs": {way: [asdict(pace) for pace in done] for way, done in paces.items()},
    }


def _prepare(shape: Shape, records: Sequence[Record]) -> tuple[Payload, Sequence[Example]]:
    texts = [
        record.text if isinstance(record, Document) else f"{record.prompt}\n{record.answer}"
        for record in records
        if isinstance(record, (Document, Instruct))
    ]
    with tempfile.TemporaryDirectory(prefix="florilegium-bench-") as folder:
        save_base(Path(folder), shape, texts)
        loaded = base.load(ModelConfig(name=folder))
    if not attention.enable(loaded.model):
        raise RuntimeError("Expected a model that can be packed; see models/attention.py.")
    attached = payload.attach(loaded.model, PayloadConfig(kind="lora"))
    return attached, encode(records, loaded.tokenizer, MAX_LENGTH).examples


def _batches(examples: Sequence[Example], way: str) -> Batches:
    return Batches(
        examples,
        batch_size=ROWS[way],
        seed=0,
        pad_id=0,
        packing=way == "packed",
        max_length=MAX_LENGTH,
    )


def _steps(batches: Batches, start: int, tokens: int) -> int:
    """Steps from `start` on that make up about `tokens` useful tokens, at least one."""
    steps = useful = 0
    while useful < tokens:
        useful += next(batches.take(start + steps, 1)).useful
        steps += 1
    return steps


def _stretch(attached: Payload, batches: Batches, start: int, steps: int) -> Pace:
    done = train(
        attached, batches.take(start, steps), TrainConfig(), steps=steps, learning_rate=1e-3
    )
    return Pace(
        done.useful_tokens / done.seconds,
        done.tokens / done.seconds,
        done.useful_tokens / done.tokens,
    )


def _text(results: Sequence[dict[str, Any]], source: str) -> str:
    rows = [
        [
            f"{result['model']} {way}",
            f"{pace['useful_per_s']:.0f}",
            f"{pace['tokens_per_s']:.0f}",
            f"{100 * pace['useful_share']:.0f} %",
            f"{result['ratio']:.2f}" if way == "packed" else "",
        ]
        for result in results
        for way, pace in result["median"].items()
    ]
    columns = ("model and batches", "useful tokens/s", "tokens/s", "useful", "packed/padded")
    lengths = ", ".join(f"{result['mean_length']:.0f} ({result['model']})" for result in results)
    return (
        f"{table(columns, rows)}\n\n{results[0]['examples']} rows of {source}, mean length "
        f"{lengths} tokens, cut at {MAX_LENGTH}; LoRA, one thread; {ROWS['padded']} examples per "
        f"padded batch (to its longest), {ROWS['packed']} rows of {MAX_LENGTH} per packed one. "
        f"Target: at least {TARGET} in useful tokens per second."
    )
