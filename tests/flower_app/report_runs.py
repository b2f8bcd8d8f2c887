"""Run folders with invented but plausible figures, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = """[run]
rounds = {rounds}
seed = 7
name = "{name}"
baselines = {baselines}

[model]
name = "embedded"
task = "causal-lm"

[payload]
kind = "lora"
rank = 8

[strategy]
rule = "mean"
"""

PACKAGES = ("asyncio", "email", "unittest", "xml")


def _scores(loss: float, metric: str) -> dict[str, float]:
    value = math.exp(loss) if metric == "perplexity" else 1.0 - loss / 6
    return {"loss": loss, metric: value}


def make_run(
    folder: Path,
    *,
    sites: Sequence[str] = PACKAGES,
    rounds: int = 5,
    metric: str = "perplexity",
    name: str = "florilegium",
    baselines: bool = True,
    finished: bool = True,
    bad_replies: Sequence[tuple[int, str, str, str]] = (),
    without_held_out: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write a run folder and return it.

    `bad_replies` are (round, site, status, reason); sites in `without_held_out` have no figures of
    their own; an unfinished run lacks summary.json and half of its rounds and has a cut last line.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    shift = {site: draw.uniform(-0.5, 0.5) for site in sites}
    done = rounds if finished else rounds // 2
    rows: list[dict[str, Any]] = []
    if baselines and finished:
        rows += _baselines(sites, shift, metric, without_held_out)
    rows.append(_evaluation(0, rounds, shift, metric, without_held_out))
    for round_ in range(1, done + 1):
        bad = {site: (status, why) for r, site, status, why in bad_replies if r == round_}
        for site in sites:
            rows.append(
                _site(round_, site, bad.get(site), shift=shift[site], metric=metric, draw=draw)
            )
        rows.append(_round(round_, len(sites), len(bad), draw))
        rows.append(_evaluation(round_, rounds, shift, metric, without_held_out))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text if finished else text + '{"kind": "site", "rou')
    settings = CONFIG.format(rounds=rounds, name=name, baselines=str(baselines).lower())
    (folder / "config.toml").write_text(settings)
    if finished:
        summary = _summary(
            rows, sites=sites, rounds=rounds, metric=metric, name=name, bad_replies=bad_replies
        )
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return folder


def _loss(round_: int, rounds: int) -> float:
    return 3.42 + 1.16 * math.exp(-4.2 * round_ / rounds)


def _evaluation(
    round_: int, rounds: int, shift: dict[str, float], metric: str, without: Sequence[str]
) -> dict[str, Any]:
    mean = _loss(round_, rounds)
    per_site: dict[str, Any] = {}
    for place, (site, offset) in enumerate(shift.items()):
        wave = 0.02 * math.sin(3 * round_ + place)
        per_site[site] = _scores(mean + offset + wave, metric)
        if site in without:
            per_site[site] = {"loss": math.nan, metric: None}
    row = {"kind": "evaluation", "round": round_, "eval_tokens": 48_211}
    return {**row, **_scores(mean, metric), "per_site": per_site}


def _baselines(
    sites: Sequence[str], shift: dict[str, float], metric: str, without: Sequence[str]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for site in sites:
        own = _scores(3.66 + shift[site], metric)
        row = {"kind": "baseline", "name": "local", "site": site, **_scores(3.83, metric)}
        if site not in without:
            row |= {f"own_{key}": value for key, value in own.items()}
        rows.append(row)
    rows.append({"kind": "baseline", "name": "central", **_scores(3.39, metric)})
    return rows


def _site(
    round_: int,
    site: str,
    bad: tuple[str, str] | None,
    *,
    shift: float,
    metric: str,
    draw: random.Random,
) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "site", "round": round_, "site": site}
    if bad:
        return {**row, "status": bad[0], "reason": bad[1]}
    tokens = draw.randint(38_000, 42_000)
    return {
        **row,
        "status": "ok",
        "reason": "",
        "examples": 400 + 37 * len(site),
        "train_loss": 3.5 + shift,
        "loss_before": 3.6 + shift,
        "loss_after": 3.5 + shift,
        "metric_before": _scores(3.6, metric)[metric],
        "metric_after": _scores(3.5, metric)[metric],
        "steps": 40,
        "tokens": tokens,
        "useful_tokens": int(tokens * 0.97),
        "load_s": 0.1,
        "train_s": draw.uniform(5, 7),
        "eval_s": draw.uniform(0.4, 0.7),
        "bytes_down": 131_584,
        "bytes_up": 131_712,
        "base_reads": 1,
        "worker": f"worker-{len(site) % 2}",
    }


def _round(round_: int, asked: int, bad: int, draw: random.Random) -> dict[str, Any]:
    train, wait, aggregate = draw.uniform(11, 14), draw.uniform(1, 3), draw.uniform(0.2, 0.5)
    return {
        "kind": "round",
        "round": round_,
        "asked": asked,
        "ok": asked - bad,
        "wall_s": train + wait + aggregate,
        "train_s": train,
        "wait_s": wait,
        "aggregate_s": aggregate,
        "bytes_down": 131_584 * asked,
        "bytes_up": 131_712 * (asked - bad),
        "learning_rate": 0.002,
        "update_norm": 0.4 / round_,
    }


def _summary(
    rows: list[dict[str, Any]],
    *,
    sites: Sequence[str],
    rounds: int,
    metric: str,
    name: str,
    bad_replies: Sequence[tuple[int, str, str, str]],
) -> dict[str, Any]:
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    timed = [row for row in rows if row["kind"] == "round"]
    compared = any(row["kind"] == "baseline" for row in rows)
    own = {f"own_{key}": value for key, value in _scores(3.663, metric).items()}
    keys = ("loss", metric)
    return {
        "name": name,
        "metric": metric,
        "seed": 7,
        "rounds": rounds,
        "sites": list(sites),
        "model": "embedded",
        "task": "causal-lm" if metric == "perplexity" else "classification",
        "payload": "lora",
        "rule": "mean",
        "trainable_parameters": 32_768,
        "zero_shot": {key: evaluations[0][key] for key in keys},
        "local": {**_scores(3.8312, metric), **own} if compared else None,
        "federated": {key: evaluations[-1][key] for key in keys},
        "central": _scores(3.3907, metric) if compared else None,
        "bytes_down_per_round": sum(row["bytes_down"] for row in timed) / len(timed),
        "bytes_up_per_round": sum(row["bytes_up"] for row in timed) / len(timed),
        "tokens_per_s": 23_412.7,
        "wall_s": 158.3,
        "seconds": {
            "startup": 21.4,
            "training": 61.2,
            "waiting": 9.9,
            "aggregation": 1.7,
            "baselines": 64.1,
        },
        "quarantined": [
            {"round": r, "site": site, "status": status, "reason": why}
            for r, site, status, why in bad_replies
        ],
        "mode": "simulation",
    }


def make_large_run(folder: Path) -> Path:
    """40 sites with replies of every kind, two without held-out rows; no baselines."""
    sites = [f"hospital-{place:02d}" for place in range(38)]
    sites += [
        "心血管内科与呼吸内科联合门诊部",
        "a-very-long-name-of-a-site-that-does-not-fit-anywhere",
    ]
    return make_run(
        folder,
        sites=sites,
        rounds=12,
        name="forty-sites",
        baselines=False,
        without_held_out=("hospital-03", "hospital-17"),
        bad_replies=(
            (2, "hospital-05", "quarantined", "not-finite: 3 of 32768 values are NaN or infinite."),
            (2, "hospital-09", "failed", "The site's process ended with MemoryError."),
            (4, "hospital-05", "quarantined", "norm: L2 norm 81234.5 is above the limit 10000."),
            (7, "hospital-21", "missing", "No reply within 3600 s."),
        ),
        seed=3,
    )
