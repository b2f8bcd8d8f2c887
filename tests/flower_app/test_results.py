"""The studies on real data: what is kept of a seed, and what its table says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.run.run import parse_config_args, simulation_config_from_json

from flower_app.bench import split_tasks
from flower_app.bench.results import (
    ROOT,
    STUDIES,
    Study,
    federation_of,
    record,
    resolve,
    settings,
    table,
)
from flower_app.config import defaults, parse
from flower_app.local import flwr_run

STUDY = STUDIES["sst2"]


def summary(seed: int, accuracy: float) -> dict[str, Any]:
    score = {"loss": 1.0, "accuracy": accuracy, "own_loss": 1.0, "own_accuracy": accuracy}
    return {
        "seed": seed, "metric": "accuracy", "sites": ["a", "b"], "rounds": 2, "payload": "lora",
        "trainable_parameters": 10, "zero_shot": score, "local": score, "federated": score,
        "central": {"loss": 0.5, "accuracy": accuracy}, "bytes_up_per_round": 80,
        "bytes_down_per_round": 80, "wall_s": 3.0,
    }  # fmt: skip


def test_seeds_add_up_and_a_second_try_replaces_the_first(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    record("sst2", STUDY, summary(1, 0.9), path)
    record("sst2", STUDY, summary(0, 0.6), path)
    kept = record("sst2", STUDY, summary(1, 0.8), path)
    assert [(row["seed"], row["federated"]["accuracy"]) for row in kept] == [(0, 0.6), (1, 0.8)]
    assert json.loads(path.read_text()) == {"sst2": kept}
    text = table(STUDY, kept)
    assert "| Federated | 1.000 ± 0.000 | 0.700 ± 0.141 | 0.700 ± 0.141 |" in text
    assert "2 seeds" in text and "0.500 ± 0.000 above pooled" in text


def test_figures_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    other = replace(STUDY, config={**STUDY.config, "run.rounds": 3})
    assert settings(other) != settings(STUDY)
    record("sst2", other, summary(0, 0.1), path)
    record("alpaca", STUDIES["alpaca"], summary(0, 0.2), path)
    kept = record("sst2", STUDY, summary(1, 0.8), path)
    assert [row["seed"] for row in kept] == [1]
    assert set(json.loads(path.read_text())) == {"alpaca", "sst2"}


def test_split_tasks_compare_the_same_seeds() -> None:
    def figures(before: float, after: float, guess: float | None = 0.5) -> dict[str, Any]:
        ends = {"accuracy": after, "loss": 1 - after}
        found = {"zero_shot": {"accuracy": before}, "federated": ends, "most_frequent": guess}
        return {"metric": "accuracy", **found}

    ways = (("central", 0.6), ("federated", 0.5), ("split", 0.7))
    found = {
        f"{task}/{way}/{seed}": figures(0.5, after + seed / 10 * (way == "split"), guess)
        for task, guess in (("rte", 0.52), ("xsum", None))
        for way, after in ways
        for seed in (0, 1)
    }
    found["rte/split/2"] = figures(0.5, 0.0)  # of a seed that is not whole yet
    rte, xsum, _, summed = split_tasks.table(found).splitlines()[-4:]
    assert rte == (
        "| rte, 2 seeds | MiniLM | accuracy | 0.520 | 0.500 ± 0.000 | 0.600 ± 0.000 | "
        "0.500 ± 0.000 | 0.750 ± 0.071 | +0.150 ± 0.071 | 0.400 ± 0.000; 0.250 ± 0.071 |"
    )
    assert xsum.startswith("| xsum, 2 seeds | stories260K | accuracy | – |")
    assert summed == (  # of rte alone: differences of 10 and 20 points
        "Split against central over all 2 pairs of runs that classify: +15.00 points, "
        "standard error 5.00."
    )
    one, many = (split_tasks.study("rte", way) for way in ("central", "split"))
    assert one.sites * int(one.config["train.batch-size"]) == many.sites * int(
        many.config["train.batch-size"]
    )


SPLIT = [split_tasks.study(task, way) for task in split_tasks.TASKS for way in split_tasks.WAYS]


@pytest.mark.parametrize("study", [*STUDIES.values(), *SPLIT])
def test_the_settings_of_a_study_are_a_configuration(study: Study, tmp_path: Path) -> None:
    (tmp_path / str(study.config["model.name"])).mkdir(parents=True)
    given = resolve(study, tmp_path, seed=3)
    found = parse(defaults() | given).flat()
    assert {key: found[key] for key in given} == given and found["run.seed"] == 3
    for at_once in (False, True):
        command = flwr_run(tmp_path, ROOT, {}, federation=federation_of(study, at_once=at_once))
        said = command[command.index("--federation-config") + 1]
        options = {k.replace("-", "_"): v for k, v in parse_config_args([said]).items()}
        assert simulation_config_from_json(options).num_supernodes == study.sites


def test_a_misspelt_study_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        split_tasks.main(["rtee"])
    assert "unknown name 'rtee'; choose among boolq, cb" in capsys.readouterr().err
