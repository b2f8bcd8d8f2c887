"""The sentences of the report, each true of the run it is written for."""

from __future__ import annotations

from collections.abc import Mapping

from flower_app.report.figures import MOST_SITES
from flower_app.report.numbers import count, duration, number, plural, score, size
from flower_app.report.records import Run
from privacy.statement import shown

MEANING = {
    "perplexity": "how many tokens the model hesitates between, on average; lower is better",
    "accuracy": "the share of held-out rows it classifies rightly; higher is better",
}


def headline(run: Run) -> str:
    """What happened, in one sentence."""
    sites = plural(len(run.sites), "site")
    done = max((int(row["round"]) for row in run.rounds), default=0)
    if run.finished:
        rounds = plural(number(run.summary, "rounds") or done, "round")
        return f"{sites} trained one language model together for {rounds}."
    planned = number(run.summary, "rounds")
    progress = f"{done} of {plural(planned, 'round')}" if planned else plural(done, "round")
    return f"This run has not ended: {progress} finished so far, with {sites}."


def verdict(run: Run) -> list[str]:
    """What came of it, in up to four sentences that compare only what was measured."""
    loss = {
        key: number(run.summary.get(key), "loss")
        for key in ("zero_shot", "local", "federated", "central")
    }
    start, alone, ours, pooled = loss.values()
    if ours is None:
        return []
    said = []
    if start is not None:
        way = "lowered" if ours < start else "raised" if ours > start else "left"
        tail = f"at {score(ours)}" if way == "left" else f"from {score(start)} to {score(ours)}"
        said.append(f"Federated training {way} the loss on held-out rows {tail}.")
    if alone is not None:
        way = "better than" if ours < alone else "worse than" if ours > alone else "equal to"
        said.append(f"That is {way} what sites reach alone ({score(alone)} on average).")
    if alone is not None and pooled is not None and pooled < alone:
        closed = (alone - ours) / (alone - pooled)
        if closed >= 1:
            said.append(f"It matches training on all data pooled in one place ({score(pooled)}).")
        elif closed > 0:
            said.append(
                f"It closes {100 * closed:.0f} % of the gap between training alone and training "
                f"on all data pooled in one place ({score(pooled)})."
            )
    personal, shared = (number(run.summary.get(k), "own_loss") for k in ("personal", "federated"))
    if personal is not None and shared is not None:
        said.append(
            f"On its own rows a site's personal model reaches {score(personal)} on average, the "
            f"shared one {score(shared)}."
        )
    return said


def attack(run: Run) -> list[str]:
    """That the run was under a simulated attack, by whom, and what came of its backdoor."""
    if run.attack is None:
        return []
    named = run.attack.get("malicious")
    sites = [str(site) for site in named] if isinstance(named, list) else []
    said = [
        f"This run was under a simulated attack, {run.attack.get('name')}, by "
        f"{len(sites)} of its {len(run.sites)} sites: {', '.join(sites)}. Do not use its model."
    ]
    rates = [number(row, "backdoor_success") for row in run.evaluations]
    known = [rate for rate in rates if rate is not None]
    if known:
        said.append(
            f"The global model puts {100 * known[-1]:.1f} % of the held-out rows of other classes "
            f"into the attacker's class once they carry the trigger; at first it was "
            f"{100 * known[0]:.1f} %."
        )
    return said


def travelled(run: Run) -> list[str]:
    """What went from the sites to the server and back, for a data-protection officer."""
    payload = run.summary.get("payload")
    said = []
    if payload == "split":
        said.append(
            "Rows of data, token ids and labels stayed at the sites. Activations of the model's "
            "inner blocks, and their gradients, went to the server and back."
        )
    elif payload:
        parameters = number(run.summary, "trainable_parameters")
        kept = number(run.summary, "personal_parameters") or 0
        if parameters is not None:
            parameters -= kept
        amount = "the" if parameters is None else f"{count(parameters)}"
        what = "parameters of the whole model" if payload == "full" else "trained parameters"
        said.append(
            f"Rows of data stayed at the sites. In each round a site received {amount} {what} "
            f"(payload kind “{payload}”) and sent back how its training changed them, with a "
            f"report of numbers: {_reported(run)}, kept in metrics.jsonl."
        )
        if kept:
            said.append(
                f"Another {count(kept)} trained parameters never left the site, which trains its "
                "own; figures of a site are those of the shared part together with them."
            )
    if kind := secure(run):
        said.append(
            f"The updates were added up by secure aggregation (“{kind}”): the server saw sums over "
            "groups of sites and no single site's update; docs/privacy.md says on what that rests."
        )
    down, up = (number(run.summary, f"bytes_{way}_per_round") for way in ("down", "up"))
    if down is not None and up is not None:
        said.append(f"Per round that is {size(down)} to all sites together and {size(up)} back.")
    if fold := number(run.summary, "bytes_down_fold_per_round"):
        said.append(
            f"Of what went to the sites, {size(fold)} per round was the change of the frozen "
            "weights by which the rule aggregates exactly."
        )
    if run.summary.get("mode") == "simulation":
        said.append("This run was a simulation: all sites were processes on one machine.")
        if run.summary.get("central"):
            said[-1] += (
                " To compare, it also trained one model on all rows in one place, for as many "
                "steps as one site takes, so that the sites together saw more rows than it did; "
                "nothing of that went into the federated model."
            )
            if _unit(run) != "none":
                said[-1] += " Training alone and on pooled rows had no noise."
    return said


def secure(run: Run) -> str:
    """The kind of secure aggregation; empty without."""
    kind = run.summary.get("secure_aggregation")
    return kind if isinstance(kind, str) and kind != "none" else ""


def _reported(run: Run) -> str:
    if (unit := _unit(run)) == "record" or metrics_told(run):
        counts = "training rows, times and steps" if unit == "record" else "training rows and times"
        scores = {"noised": ", and scores with noise", "exact": ", and scores as they are"}
        return f"its {counts}{scores.get(metrics_told(run), '')}"
    return "its training rows, losses, times and counts"


def metrics_told(run: Run) -> str:
    """What sites that add the noise themselves say of scores; empty for others, or unknown."""
    told = run.summary.get("privacy")
    return str(told.get("metrics", "")) if isinstance(told, Mapping) else ""


def _unit(run: Run) -> str:
    told = run.summary.get("privacy")
    unit = told.get("unit") if isinstance(told, Mapping) else None
    return str(unit) if unit in ("record", "client") else "none"


def privacy(run: Run) -> list[str]:
    """What the run guarantees and on what that rests, or that it guarantees nothing."""
    told, unit = run.summary.get("privacy"), _unit(run)
    if not isinstance(told, Mapping) or unit == "none":
        return [
            "Trained parameters can carry traces of the rows they were trained on. This page makes "
            f"no claim of differential privacy{' for rows' if stream(run) else ''}.",
            *stream(run),
        ]
    if not run.finished:
        return [f"Noise protects each {unit}; what it guarantees is accounted at the end."]
    assumed = told.get("assumptions")
    rests = "; ".join(str(entry) for entry in assumed) if isinstance(assumed, list) else "unknown"
    if number(told, "epsilon") is None:
        return [f"Noise was added, but no epsilon is guaranteed: {rests}."]
    said = [f"Differential privacy: {told.get('text')}.", f"It rests on this: {rests}."]
    sites = told.get("sites")
    known = [e for site in sites if (e := number(sites, site)) is not None] if sites else []
    if isinstance(sites, Mapping) and len(known) > 1:
        said.append(
            f"The {unit}s of the sites spent between {shown(min(known))} and "
            f"{shown(max(known))}, by their rows and the rounds in which they were asked."
        )
    return said


def stream(run: Run) -> list[str]:
    """What the noise on the vectors of a split model's streams guarantees; nothing without."""
    told = run.summary.get("privacy")
    told = told.get("stream") if isinstance(told, Mapping) else None
    if not isinstance(told, Mapping) or number(told, "epsilon") is None:
        return []
    assumed = told.get("assumptions")
    rests = "; ".join(str(entry) for entry in assumed) if isinstance(assumed, list) else "unknown"
    return [
        "Every vector that crossed the cut to the server was clipped and had noise added: "
        f"{told.get('text')}. It rests on this: {rests}."
    ]


def spent(run: Run) -> str:
    """Where the time of the whole run went, or nothing if that is not known."""
    seconds = run.summary.get("seconds")
    if not isinstance(seconds, dict):
        return ""
    names = {"startup": "start-up", "baselines": "comparisons"}
    parts = [
        f"{names.get(str(part), str(part))} {duration(value)}"
        for part in seconds
        if (value := number(seconds, part)) is not None
    ]
    return f"Whole run: {', '.join(parts)}." if parts else ""


def sites_note(run: Run, drawn: int) -> str:
    """Says when the plot of sites leaves some out."""
    if drawn < MOST_SITES or len(run.sites) <= drawn:
        return ""
    return f"Of {len(run.sites)} sites, the {drawn} that are worst off are drawn."


def gaps(run: Run) -> list[str]:
    """What the page cannot show, and why."""
    said = []
    if run.finished and run.summary.get("local") is None and run.summary.get("central") is None:
        said.append(
            "Training alone and training on pooled data were not measured in this run "
            "(run.baselines)."
        )
    if run.unread_lines:
        lines = plural(run.unread_lines, "line")
        said.append(f"{lines} of metrics.jsonl could not be read, and this page goes without.")
    return said
