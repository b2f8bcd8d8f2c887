"""The decisive cells on the whole model: each a `flwr run` with LoRA on MiniLM's linear layers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from flower_app.bench.results import STUDIES, Study, run_study

SITES = 10
_SETTINGS: Mapping[str, bool | int | float | str] = {
    **STUDIES["sst2"].config,
    # Local steps alone: a server optimiser does not go with rules that cut products anew.
    "strategy.server-optimizer": "none",
    "strategy.server-learning-rate": 1.0,
    "train.optimizer": "adamw",
    "train.learning-rate": 1e-3,
    "train.steps": 10,
    "run.baselines": False,
    "run.rounds": 8,
    "train.score-every": 8,
    "data.partition": "iid",
    "strategy.num-byzantine": 2,
    "attack.target": 1,
}
_MEAN: Mapping[str, str] = {}
_BEST: Mapping[str, str] = {"strategy.rule": "geometric-median", "strategy.pre": "nnm"}
RUNS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "scaling, mean": ("scaling", _MEAN),
    "none, mean": ("none", _MEAN),
    "scaling, defended": ("scaling", _BEST),
    "none, defended": ("none", _BEST),
    "backdoor, mean": ("backdoor", _MEAN),
    "backdoor, defended": ("backdoor", _BEST),
    "sign-flip, mean": ("sign-flip", _MEAN),
    "sign-flip, defended": ("sign-flip", _BEST),
}


def study(attack: str, defence: Mapping[str, str]) -> Study:
    """The federation of one run."""
    config = {**_SETTINGS, **defence, "attack.name": attack}
    return replace(STUDIES["sst2"], sites=SITES, config=config)


def run(data: Path, file: Path, processes: int, seed: int = 0) -> bool:
    """Run what `file` does not hold yet, `processes` at a time, and write it there."""
    done = {line["name"]: line for line in (json.loads(file.read_text()) if file.is_file() else [])}

    def one(name: str) -> None:
        attack, defence = RUNS[name]
        started = time.monotonic()
        summary = run_study(study(attack, defence), data, seed)
        done[name] = {"name": name, "attack": attack, "defence": _named(defence), "seed": seed,
                      **_kept(summary), "seconds": round(time.monotonic() - started)}  # fmt: skip
        lines = [done[key] for key in RUNS if key in done]
        file.write_text(json.dumps(lines, indent=1) + "\n")
        print(f"{name}: {done[name]}", flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, [name for name in RUNS if name not in done]))
    return True


def _named(defence: Mapping[str, str]) -> str:
    if not defence:
        return "mean"
    return " + ".join(filter(None, (defence.get("strategy.pre"), defence["strategy.rule"])))


def _kept(summary: Mapping[str, Any]) -> dict[str, Any]:
    attack = summary["attack"] or {}
    return {
        "accuracy": summary["federated"]["accuracy"],
        "backdoor": attack.get("backdoor_success"),
        "malicious": attack.get("malicious", []),
        "sites": len(summary["sites"]),
        "rounds": summary["rounds"],
    }
