"""What a run guarantees, as its summary, report and model card say it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flower_app import clientlevel
from flower_app.config import Config
from flower_app.releases import evaluations, parts_apart, releases, unit_of
from privacy.events import Event, Unit
from privacy.statement import Statement, state

_PUBLIC = "held-out rows are public: their scores have no noise"
_SERVERS_OWN = (
    "who was asked, and what sites report, stays with the server: the run folder is not covered, "
    "but for its adapter"
)
_REPEATS = "the noise repeats with run.seed: it is for experiments, and protects nobody"
_OF_ONE_RUN = "this run alone: ledgers add up the runs on the same rows"


def guarantee(
    config: Config,
    metrics: Iterable[Mapping[str, Any]],
    rows: Mapping[str, int],
    released: Sequence[Event],
    candidates: Mapping[str, int] | None = None,
    asked: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The epsilon of a run for `summary.json`; only the unit, `none`, without privacy.

    With `split.noise` that of one position is beside it, as `stream`.

    `metrics` are the rows of metrics.jsonl, which tell the rounds that each site was asked in,
    `rows` the rows of each site, `candidates` the most answers that one of its held-out rows has to
    choose from, `released` the server's own events, `asked` what `RunFolder.asked` gives: it has
    the rounds that a run which went on after a crash did twice, as the sites' ledgers do. Sites'
    epsilons are what the configuration leads to then. The largest of them is the run's.
    """
    unit = unit_of(config)
    if unit is None:
        return {"unit": "none"}
    told = _told(config, unit, metrics, rows, released, candidates or {}, asked)
    return {"unit": "none", "stream": told} if unit == "position" else told


def _told(
    config: Config,
    unit: Unit,
    metrics: Iterable[Mapping[str, Any]],
    rows: Mapping[str, int],
    released: Sequence[Event],
    candidates: Mapping[str, int],
    asked: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The statement of the worst site, or of the server, as plain values."""
    sites = {} if released else _of_sites(config, unit, metrics, rows, candidates, asked)
    if released:
        worst = state(released, unit, config.privacy.delta)
    else:
        worst = max(sites.values(), key=lambda told: told.epsilon, default=None) or state(
            [], unit, config.privacy.delta
        )
    told = worst.as_dict()
    told["assumptions"] += [
        *([_SERVERS_OWN] if clientlevel.central(config) else []),
        *([_REPEATS] if config.privacy.noise_source == "seeded" else []),
        _OF_ONE_RUN,
    ]
    if config.privacy.noised_by_sites:
        told["metrics"] = config.privacy.metrics
        if config.privacy.metrics == "exact":
            told["assumptions"] += [_PUBLIC]
    told["text"] = str(worst)
    told["sites"] = {site: found.as_dict()["epsilon"] for site, found in sites.items()}
    return told


def _of_sites(
    config: Config,
    unit: Unit,
    metrics: Iterable[Mapping[str, Any]],
    rows: Mapping[str, int],
    candidates: Mapping[str, int],
    asked: Sequence[Mapping[str, Any]],
) -> dict[str, Statement]:
    """The statement of each site that was asked to train; equal sites are accounted once."""
    trained, scored = _counted(asked, "train"), _counted(asked, "evaluate")
    batches: dict[str, int] = {}
    for row in metrics:
        if row["kind"] == "site" and row["status"] != "refused":
            trained[str(row["site"])] |= Counter([int(row["round"])])
            if isinstance(row.get("examples"), int):
                rows = {**rows, str(row["site"]): row["examples"]}
            if isinstance(row.get("candidates"), int):
                candidates = {**candidates, str(row["site"]): row["candidates"]}
            if isinstance(row.get("batches"), int) and row["batches"] > 0:
                batches[str(row["site"])] = row["batches"]
    alone = Counter([config.run.rounds, *([0] if config.strategy.fraction < 1 else [])])
    split = "held out of the same rows" if parts_apart(config) else ""
    known: dict[frozenset[tuple[Event, int]], Statement] = {}
    found = {}
    for site, rounds in sorted(trained.items()):
        if site not in rows:
            continue
        most = candidates.get(site, 0)
        listed = sorted(rounds.elements())
        training = releases(config, rows[site], listed, batches.get(site, 0), most)
        apart = (scored[site] | alone).elements()
        ends = [event for at in apart for event in evaluations(config, at, most)]
        events = [replace(event, split=split, round=0) for event in [*training, *ends]]
        alike = frozenset(Counter(events).items())
        if alike not in known:
            known[alike] = state(events, unit, config.privacy.delta)
        found[site] = known[alike]
    return found


def _counted(asked: Iterable[Mapping[str, Any]], kind: str) -> dict[str, Counter[int]]:
    """How often each site was sent a message of a kind, by round."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for question in asked:
        if question["kind"] == kind:
            for site in question["sites"]:
                found[str(site)][int(question["round"])] += 1
    return found
