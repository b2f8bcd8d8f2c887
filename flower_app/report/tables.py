"""The tables of the report, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flower_app.report import words
from flower_app.report.numbers import (
    MISSING,
    count,
    duration,
    number,
    plural,
    safe,
    score,
    share,
    size,
)
from flower_app.report.records import Run
from flower_app.report.table import result_rows

COLOURS = {
    "zero_shot": "before",
    "local": "alone",
    "federated": "federated",
    "personal": "personal",
    "central": "pooled",
}


def results(run: Run) -> str:
    """Before training, alone, federated, pooled: loss and metric, also on own rows where known."""
    rows = result_rows(run.summary)
    if not rows and words.metrics_told(run) == "withheld":
        return '<p class="soft">Scores stayed at the sites (privacy.metrics).</p>'
    if not rows:
        return '<p class="soft">The first evaluation is not finished yet.</p>'
    shown = 4 if any(value is not None for _, _, values in rows for value in values[2:]) else 2
    body = "".join(
        f'<tr class="{"ours" if key == "federated" else ""}" data-row="{key}"><th scope="row">'
        f'<span class="swatch" style="--c: var(--{COLOURS[key]})"></span>{label}</th>'
        f"{''.join(f'<td>{score(value)}</td>' for value in values[:shown])}</tr>\n"
        for key, label, values in rows
    )
    group = '<th colspan="2" scope="colgroup">all held-out rows</th>'
    own = '<th colspan="2" scope="colgroup">each on its own rows</th>' if shown == 4 else ""
    heads = f'<th scope="col">loss</th><th scope="col">{safe(run.metric)}</th>' * (shown // 2)
    return _scroll(
        "Results",
        f'<table id="results"><caption>Measured on held-out rows, which no training in this '
        "run saw; the first two columns on the same rows throughout."
        f"</caption><thead><tr><td></td>{group}{own}</tr><tr><td></td>{heads}</tr></thead>"
        f"<tbody>\n{body}</tbody></table>",
    )


def left_out(rows: Sequence[tuple[int, str, str, str]]) -> str:
    """Round, site, status and reason of every reply that did not count, or `None`."""
    if not rows:
        return "<p>None: every reply that came was well-formed and counted.</p>"
    body = (
        [count(round_), safe(site, 120), safe(status, 30), safe(reason, 600) or MISSING]
        for round_, site, status, reason in rows
    )
    said = plural(len(rows), "reply", "replies")
    caption = f"{said} did not count; the rounds went on with the others."
    return _table("left-out", caption, ("round", "site", "what", "reason"), body, text=(1, 2, 3))


def sites(run: Run) -> str:
    """Training rows, replies that counted, scores before, alone, federated, personal of each."""
    first = run.per_site(run.evaluations[0] if run.evaluations else None)
    last = run.per_site(run.evaluations[-1] if run.evaluations else None)
    personal = run.per_site(run.personal[-1] if run.personal else None)
    keys = ["loss"] + ["accuracy"] * (run.metric == "accuracy")  # perplexity is the loss again
    body = []
    for site in run.sites:
        replies = [row for row in run.replies if str(row["site"]) == site]
        good = [row for row in replies if row.get("status", "ok") == "ok"]
        cells = [
            safe(site, 120),
            count(number(good[-1], "examples")) if good else MISSING,
            f"{len(good)} of {len(replies)}",
        ]
        for key in keys:
            cells += [
                score(number(first.get(site), key)),
                score(number(run.local.get(site), f"own_{key}")),
                score(number(last.get(site), key)),
                *[score(number(personal.get(site), key))] * bool(personal),
            ]
        body.append(cells)
    heads = ["site", "training rows", "replies"]
    for key in keys:
        heads += [f"{key} at start", "alone", "federated", *["personal"] * bool(personal)]
    caption = "On the site's own held-out rows; replies are those that counted."
    return _table("sites-table", caption, heads, body)


def rounds(run: Run) -> str:
    """Loss and metric, replies, bytes and time of each round."""
    scores = {row["round"]: row for row in run.evaluations}
    timed = {row["round"]: row for row in run.rounds}
    body = []
    lora = any("product_gap" in row for row in run.rounds)
    for round_ in sorted({*scores, *timed}):
        row, scored = timed.get(round_), scores.get(round_)
        asked = number(row, "asked")
        body.append(
            [
                "start" if round_ == 0 else count(round_),
                score(number(scored, "loss")),
                score(number(scored, run.metric)),
                f"{count(number(row, 'ok'))} of {count(asked)}" if asked is not None else MISSING,
                size(number(row, "bytes_down")),
                size(number(row, "bytes_up")),
                duration(number(row, "train_s")),
                duration(number(row, "wait_s")),
                duration(number(row, "aggregate_s")),
                *[share(number(row, "product_gap")), size(number(row, "bytes_down_fold"))] * lora,
            ]
        )
    heads = ("round", "loss", run.metric, "replies", "to sites", "back")
    times: tuple[str, ...] = ("training", "waiting", "aggregation")
    caption = "Figures of all sites together."
    if lora:
        times = (*times, "product gap", "frozen weights")
        caption += (
            " The product gap is the error of averaging A and B apart, relative to the mean of "
            "their products; “frozen weights” are the bytes of their change, sent to the sites."
        )
    return _table("rounds-table", caption, (*heads, *times), body)


def fold(title: str, content: str, *, is_open: bool) -> str:
    """Content that opens on a click."""
    state = " open" if is_open else ""
    return f'<details class="card"{state}><summary>{safe(title)}</summary>{content}</details>'


def _table(
    key: str,
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    text: Sequence[int] = (),
) -> str:
    """A table of cells that are safe already; columns in `text` are set to the left."""
    kinds = ["text" if place in text else "" for place in range(len(heads))]
    head = "".join(
        f'<th scope="col" class="{kind}">{safe(title)}</th>'
        for title, kind in zip(heads, kinds, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{cells[0]}</th>'
        + "".join(f'<td class="{k}">{c}</td>' for c, k in zip(cells[1:], kinds[1:], strict=True))
        + "</tr>\n"
        for cells in rows
    )
    card = f'<table id="{key}"><caption>{safe(caption)}</caption><thead><tr>{head}</tr></thead>'
    return _scroll(caption, f"{card}<tbody>\n{body}</tbody></table>")


def _scroll(label: str, table: str) -> str:
    """Let a wide table scroll inside its own box, reachable by keyboard."""
    box = f'<div class="card scroll" role="region" tabindex="0" aria-label="{safe(label)}">'
    return f"{box}{table}</div>"
