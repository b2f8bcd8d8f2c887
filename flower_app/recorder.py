"""Turns what happens in a run into metrics rows, checkpoints, log lines and the summary."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from logging import INFO, WARNING
from typing import Any, Literal

from flwr.common.logger import log
from torch import Tensor

from flower_app.compose import metric
from flower_app.config import Config
from flower_app.runfolder import Checkpoint, RunFolder
from models.evaluate import Score
from strategies.flower import RoundOutcome
from strategies.messages import Scalar, SiteOutcome

_NUMBERS = ("train_loss", "load_s", "train_s", "eval_s", "stream_bytes_per_token")
_COUNTS = ("examples", "steps", "tokens", "useful_tokens", "base_reads", "rank", "batches",
           "candidates", "stream_bytes_up", "stream_bytes_down")  # fmt: skip
_LARGEST = 1e15  # no honest sum of losses, count or time of a round comes near it


def score_fields(prefix: str, score: Score) -> dict[str, float | int]:
    """The sums of a score as fields of a message."""
    return {
        f"{prefix}-loss-sum": score.loss_sum,
        f"{prefix}-counted": score.counted,
        f"{prefix}-correct": score.correct,
        f"{prefix}-rows": score.rows,
    }


def read_score(prefix: str, report: Mapping[str, Scalar]) -> Score:
    """The score in a report; an empty one where it is absent or cannot be true.

    A site's figures are not trusted: one that is negative or not finite would spoil the mean.
    """
    names = ("loss-sum", "counted", "correct", "rows")
    values = [_number(report.get(f"{prefix}-{name}")) for name in names]
    loss_sum, counted, correct, rows = values
    if not all(value >= 0 for value in values) or correct > rows:
        return Score()
    return Score(loss_sum, int(counted), int(correct), int(rows))


class Recorder:
    """Listens to the strategy; every finished round is on disk before the next one starts."""

    def __init__(self, config: Config, folder: RunFolder, facts: dict[str, str]) -> None:
        self._config = config
        self._folder = folder
        self._facts = facts
        self._metric = metric(config)
        self._evaluated = {row["round"] for row in folder.rows() if row["kind"] == "evaluation"}
        self.counted = {  # site -> the last round in which its reply counted
            row["site"]: row["round"]
            for row in folder.rows()
            if row["kind"] == "site" and row["status"] == "ok"
        }
        self._beside: Callable[[], Mapping[str, Tensor]] = dict
        self._events = _tensorboard(folder) if config.run.tensorboard else None

    def refused(self, reasons: Mapping[str, str]) -> None:
        """Log the nodes that take no part, as left out before the first round."""
        for site, reason in reasons.items():
            self._folder.log(
                {"kind": "site", "round": 0, "site": site, "status": "refused", "reason": reason}
            )

    def beside(self, trained: Callable[[], Mapping[str, Tensor]], facts: Mapping[str, str]) -> None:
        """Let checkpoints also hold what the server trains itself, and more facts of the run."""
        self._beside = trained
        self._facts = {**self._facts, **facts}

    def attacked(self, name: str, malicious: Iterable[str]) -> None:
        """Log that the run is under a simulated attack, by which sites."""
        self._folder.log(
            {"kind": "attack", "round": 0, "name": name, "malicious": sorted(malicious)}
        )

    def asked(self, kind: str, round_: int, sites: Sequence[str]) -> None:
        """Note who is about to be asked, also where the round will not come to an end."""
        self._folder.note(kind, round_, sites)

    def round_finished(self, outcome: RoundOutcome) -> None:
        """Log the round's rows and make it the round to resume from."""
        good = [site for site in outcome.sites if site.status == "ok"]
        self.evaluated(
            outcome.round - 1,
            [site for site in good if read_score("before", site.report).counted],
        )
        self.counted |= {site.site: outcome.round for site in good}
        for site in outcome.sites:
            self._folder.log(self._site_row(outcome.round, site))
            if site.status != "ok":
                log(WARNING, "Round %d, %s: %s. %s", outcome.round, site.site, site.status,
                    site.reason)  # fmt: skip
        row = self._round_row(outcome, good) | _lora(outcome)
        self._folder.log(row)
        self._folder.save(
            Checkpoint(
                outcome.round,
                outcome.payload,
                outcome.state,
                self._facts,
                fold=outcome.fold,
                beside=self._beside(),
            )
        )
        loss = _mean(_number(site.report.get("train_loss")) for site in good)
        log(
            INFO,
            "Round %d of %d: %s%d of %d sites, %s up, %s down, %.1f s",
            outcome.round,
            self._config.run.rounds,
            f"training loss {loss:.4f}, " if math.isfinite(loss) else "",
            len(good),
            len(outcome.sites),
            human_bytes(row["bytes_up"]),
            human_bytes(row["bytes_down"]),
            outcome.wall_s,
        )

    def evaluated(self, round_: int, sites: Sequence[SiteOutcome]) -> None:
        """Log the global payload's score on all held-out rows, and on each site's."""
        if round_ in self._evaluated:
            return
        scores = {site.site: read_score("before", site.report) for site in sites}
        for site in sites:
            if site.status != "ok":
                log(WARNING, "Evaluation after round %d, %s: %s", round_, site.site, site.reason)
        total = sum(scores.values(), Score())
        if not total.counted:
            return
        self._evaluated.add(round_)
        row = {"kind": "evaluation", "round": round_, "eval_tokens": total.counted}
        row |= self._scores(scores)
        personal = {site.site: read_score("personal", site.report) for site in sites}
        if own := {site: score for site, score in personal.items() if score.counted}:
            row["personal"] = self._scores(own)
        backdoor = sum((read_score("backdoor", site.report) for site in sites), Score())
        if backdoor.rows:
            row["backdoor_success"] = backdoor.correct / backdoor.rows
        self._folder.log(row)
        log(INFO, "Held-out after round %d: loss %.4f, %s %.4f", round_, total.loss, self._metric,
            total.metric(self._metric))  # fmt: skip
        if self._events:
            self._events.add_scalar("held-out/loss", total.loss, round_)
            self._events.add_scalar(f"held-out/{self._metric}", row[self._metric], round_)
            self._events.flush()

    def _scores(self, scores: Mapping[str, Score]) -> dict[str, Any]:
        """Figures on all held-out rows and on each site's, and the sums that they are made of."""
        return {
            **self.score(sum(scores.values(), Score())),
            "per_site": {site: self.score(score) for site, score in scores.items()},
            "sums": {site: list(astuple(score)) for site, score in scores.items()},
        }

    def score(self, score: Score) -> dict[str, float | None]:
        """Loss and the task's metric of a score, None where there were no rows."""
        return _score(score, self._metric)

    def _site_row(self, round_: int, site: SiteOutcome) -> dict[str, Any]:
        row: dict[str, Any] = {
            "kind": "site",
            "round": round_,
            "site": site.site,
            "status": site.status,
            "reason": site.reason,
            "bytes_down": _carried(site, "down"),
            "bytes_up": _carried(site, "up"),
        }
        for name in (*_NUMBERS, *_COUNTS):
            value = site.report.get(name)
            if math.isfinite(_number(value)):
                row[name] = value
        row["worker"] = str(site.report.get("worker", ""))
        for when in ("before", "after"):
            values = self.score(read_score(when, site.report))
            row[f"loss_{when}"], row[f"metric_{when}"] = values["loss"], values[self._metric]
        return row

    def _round_row(self, outcome: RoundOutcome, good: Sequence[SiteOutcome]) -> dict[str, Any]:
        busy: dict[str, float] = defaultdict(float)
        for site in good:
            report = site.report
            spent = (_number(report.get(name)) for name in ("load_s", "train_s", "eval_s"))
            busy[str(report.get("worker"))] += sum(s for s in spent if s >= 0)
        train_s = min(max(busy.values(), default=0.0), outcome.wall_s - outcome.aggregate_s)
        train = self._config.train
        return {
            "kind": "round",
            "round": outcome.round,
            "asked": len(outcome.sites),
            "ok": len(good),
            "wall_s": outcome.wall_s,
            "train_s": train_s,
            "wait_s": max(outcome.wall_s - outcome.aggregate_s - train_s, 0.0),
            "aggregate_s": outcome.aggregate_s,
            "bytes_down": sum(_carried(site, "down") for site in outcome.sites),
            "bytes_up": sum(_carried(site, "up") for site in outcome.sites),
            "learning_rate": train.learning_rate_at(outcome.round, self._config.run.rounds),
            "update_norm": outcome.update_norm,
        }


def _carried(site: SiteOutcome, way: Literal["up", "down"]) -> int:
    """Bytes of a site's messages and, as it counted them, of its stream."""
    messages = site.bytes_up if way == "up" else site.bytes_down
    stream = _number(site.report.get(f"stream_bytes_{way}"))
    return messages + (int(stream) if stream > 0 else 0)


def _lora(outcome: RoundOutcome) -> dict[str, float | int]:
    """What only a round of LoRA has to tell."""
    told: dict[str, float | int] = {}
    if outcome.product_gap is not None:
        told["product_gap"] = outcome.product_gap
    if outcome.fold:
        told["bytes_down_fold"] = outcome.bytes_down_fold
    return told


def _score(score: Score, metric_name: str) -> dict[str, float | None]:
    values = {"loss": score.loss, metric_name: score.metric(metric_name)}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def summarise(
    config: Config, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary of a run from its metrics rows; `facts` are added as they are."""
    name = metric(config)
    evaluations = {row["round"]: row for row in rows if row["kind"] == "evaluation"}
    rounds = [row for row in rows if row["kind"] == "round"]
    sites = [row for row in rows if row["kind"] == "site"]
    wall = sum(row["wall_s"] for row in rounds)
    local = [row for row in rows if row["kind"] == "baseline" and row["name"] == "local"]
    central = [row for row in rows if row["kind"] == "baseline" and row["name"] == "central"]

    first, last = evaluations.get(0), evaluations.get(len(rounds))
    # A site that was missing at one end would have the two compared on different rows.
    both = [set(row["sums"]) for row in (first, last) if row]
    common = sorted(set.intersection(*both)) if both else []

    def score(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if row is None:
            return None
        scores = [Score(*row["sums"][site]) for site in common if site in row["sums"]]
        own = _average([_score(score, name) for score in scores], ("loss", name))
        return _score(sum(scores, Score()), name) | {f"own_{k}": v for k, v in own.items()}

    return {
        "name": config.run.name,
        "metric": name,
        "seed": config.run.seed,
        "rounds": len(rounds),
        "sites": sorted({row["site"] for row in sites if row["status"] != "refused"}),
        "model": config.model.name,
        "task": config.model.task,
        "payload": config.payload.kind,
        "rule": config.strategy.rule,
        "secure_aggregation": config.secure.aggregation,
        "zero_shot": score(first),
        "local": _average(local, ("loss", name, "own_loss", f"own_{name}")) if local else None,
        "federated": score(last),
        "personal": score(last.get("personal")) if last else None,
        "central": {key: central[-1][key] for key in ("loss", name)} if central else None,
        "bytes_down_per_round": _per_round(rounds, "bytes_down"),
        "bytes_up_per_round": _per_round(rounds, "bytes_up"),
        "bytes_down_fold_per_round": _per_round(rounds, "bytes_down_fold"),
        "product_gap": _average(rounds, ("product_gap",))["product_gap"],
        "tokens_per_s": _speed(sites, wall),
        "attack": attack_in(rows),
        "quarantined": [
            {key: row[key] for key in ("round", "site", "status", "reason")}
            for row in sites
            if row["status"] != "ok"
        ],
        "seconds": {
            "training": sum(row["train_s"] for row in rounds),
            "waiting": sum(row["wait_s"] for row in rounds),
            "aggregation": sum(row["aggregate_s"] for row in rounds),
        },
    } | dict(facts)


def _speed(sites: Iterable[Mapping[str, Any]], wall: float) -> float | None:
    """Tokens per second over all sites, None where private ones keep their counts."""
    counted = [row["tokens"] for row in sites if row["status"] == "ok" and "tokens" in row]
    if not wall:
        return 0.0
    return sum(counted) / wall if counted else None


def attack_in(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The simulated attack of a run: name, malicious sites, last success rate of its backdoor.

    The rate is None without a backdoor; without an attack all is None.
    """
    found: dict[str, Any] | None = None
    success = None
    for row in rows:
        if row.get("kind") == "attack":
            found = {key: row.get(key) for key in ("name", "malicious")}
        elif row.get("kind") == "evaluation":
            success = row.get("backdoor_success", success)
    return found and found | {"backdoor_success": success}


def human_bytes(count: float) -> str:
    """A size in the unit a person would pick."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _average(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, float | None]:
    means = {name: _mean(row.get(name) for row in rows) for name in names}
    return {name: value if math.isfinite(value) else None for name, value in means.items()}


def _number(value: object) -> float:
    """A site's figure, NaN where it is none; `bool` is an int to Python, but not a figure."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if abs(value) < _LARGEST else math.nan


def _per_round(rounds: Sequence[Mapping[str, Any]], name: str) -> int:
    return round(sum(row.get(name, 0) for row in rounds) / len(rounds)) if rounds else 0


def _mean(values: Iterable[Any]) -> float:
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _tensorboard(folder: RunFolder) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.path / "tensorboard"))
