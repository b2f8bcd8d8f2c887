"""One self-contained HTML page: no script, no network, nothing that is not in it."""

from __future__ import annotations

import html
from collections.abc import Sequence

import matplotlib

from flower_app.report import tables, words
from flower_app.report.figures import curves, drawn_sites, site_values, sites, times, traffic
from flower_app.report.numbers import clean, count, duration, number, safe, score, share, size
from flower_app.report.records import Run
from flower_app.report.style import SHEET
from flower_app.report.svg import STYLE, inline
from flower_app.report.table import privacy

# Even if something slipped through the escaping, the browser runs and loads nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

PETALS = "".join(
    f'<ellipse cx="12" cy="5.4" rx="2.7" ry="4.6" transform="rotate({turn} 12 12)"/>'
    for turn in range(0, 360, 60)
)
FLOWER = (
    '<svg viewBox="0 0 24 24" aria-hidden="true"><g fill="none" stroke="currentColor" '
    f'stroke-width="1.3">{PETALS}</g><circle cx="12" cy="12" r="1.7" fill="currentColor"/></svg>'
)


def render(run: Run) -> str:
    """The whole page; equal runs give equal pages."""
    name = safe(run.summary.get("name") or "run", 120)
    left_out = run.left_out()
    with matplotlib.rc_context(STYLE):
        plots = _plots(run)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · run report</title>
<style>
{SHEET}</style>
</head>
<body>
<header>
<div class="brand">{FLOWER}<span>florilegium · run report</span></div>
<h1>{name}</h1>
{"" if run.finished else '<div class="badge">In progress</div>'}
{'<div class="badge">Simulated attack</div>' if run.attack else ""}
<p class="lead">{safe(words.headline(run))} {safe(" ".join(words.verdict(run)), 900)}</p>
{_paragraphs(words.attack(run), "attack")}
{_facts(run)}
</header>
<main>
<section>
<h2>Results</h2>
{tables.results(run)}
{_paragraphs(words.gaps(run), "soft")}
</section>
<section>
<h2>What travelled</h2>
{_paragraphs(words.travelled(run))}
{_paragraphs(words.privacy(run), "privacy")}
</section>
<section>
<h2>Rounds and sites</h2>
<div class="plots">
{plots}
</div>
</section>
<section>
<h2>Replies that were left out</h2>
{tables.left_out(left_out)}
</section>
<section>
<h2>In detail</h2>
{tables.fold("Figures of each site", tables.sites(run), is_open=False)}
{tables.fold("Figures of each round", tables.rounds(run), is_open=False)}
{tables.fold("Configuration", _config(run), is_open=False)}
</section>
</main>
<footer>
<p class="soft">Loss is the mean negative log-likelihood per predicted token (or per row, in
classification) on rows that no site trained on; lower is better. {_meaning(run)}
1&nbsp;MiB is 1,048,576 bytes.</p>
<p class="soft">Written from metrics.jsonl, summary.json and config.toml in this folder. The page
is complete in itself: it runs no script and loads nothing.</p>
</footer>
</body>
</html>
"""


def _meaning(run: Run) -> str:
    meaning = words.MEANING.get(run.metric)
    return f"{safe(run.metric).capitalize()} is {meaning}." if meaning else ""


def _paragraphs(sentences: Sequence[str], kind: str = "") -> str:
    return "\n".join(f'<p class="{kind}">{safe(sentence, 900)}</p>' for sentence in sentences)


def _config(run: Run) -> str:
    text = "\n".join(clean(line, 2000) if line else "" for line in run.config_text.splitlines())
    return f"<pre>{html.escape(text) or 'config.toml is not in the folder.'}</pre>"


def _facts(run: Run) -> str:
    summary = run.summary
    known = {
        "Model": summary.get("model"),
        "Payload": summary.get("payload"),
        "Trained parameters": count(number(summary, "trainable_parameters")),
        "Rule": summary.get("rule"),
        "Secure aggregation": words.secure(run),
        "Per round, to sites": size(number(summary, "bytes_down_per_round")),
        "Per round, back": size(number(summary, "bytes_up_per_round")),
        "Error of averaging A and B apart": share(number(summary, "product_gap")),
        "Tokens per second": count(number(summary, "tokens_per_s")),
        "Wall time": duration(number(summary, "wall_s")),
        "Differential privacy": privacy(summary),
        "Seed": summary.get("seed"),
        "Mode": summary.get("mode"),
    }
    cells = "".join(
        f"<div><dt>{label}</dt><dd>{safe(value, 80)}</dd></div>\n"
        for label, value in known.items()
        if value not in (None, "", "–")
    )
    return f'<dl class="facts">\n{cells}</dl>' if cells else ""


def _plots(run: Run) -> str:
    keys = list(dict.fromkeys(("loss", run.metric)))
    parts = [_curve(run, key) for key in keys] + [_sites(run, key) for key in keys]
    found = [part for part in (*parts, _traffic(run), _times(run)) if part]
    return "\n".join(found) or '<p class="soft">Nothing has been measured yet.</p>'


def _curve(run: Run, key: str) -> str:
    figure = curves(run, key)
    if figure is None:
        return ""
    title = f"{clean(key).capitalize()} on held-out rows"
    last = score(number(run.evaluations[-1], key))
    text = f"{title}, round by round; the last value of the federated model is {last}."
    known = {"local": ("alone", "alone", "dashed"), "central": ("pooled", "pooled", "dotted")}
    keys = [("federated", "federated", "line thick"), ("sites", "federated, each site", "line")]
    keys += [("personal", "personal, each on its own rows", "line")] * bool(run.personal)
    keys += [entry for k, entry in known.items() if number(run.summary.get(k), key) is not None]
    return _figure(f"curve-{key}", title, "", _keys(keys), inline(figure, "c-" + key, title, text))


def _sites(run: Run, key: str) -> str:
    figure = sites(run, key)
    if figure is None:
        return ""
    drawn = len(drawn_sites(run, key))
    title = f"{clean(key).capitalize()} at each site"
    better = "right" if key == "accuracy" else "left"
    note = f"On the site's own rows; further {better} is better. {words.sites_note(run, drawn)}"
    marks = {
        "before": "round hollow",
        "alone": "diamond",
        "pooled": "",
        "federated": "round",
        "personal": "triangle",
    }
    labels = {"before": "before training"}
    keys = _keys([(k, labels.get(k, k), marks[k]) for k in site_values(run, key)])
    text = f"{title}; the numbers are in the table of sites below."
    return _figure(f"sites-{key}", title, note, keys, inline(figure, "s-" + key, title, text))


def _traffic(run: Run) -> str:
    figure = traffic(run)
    if figure is None:
        return ""
    title, note = "Bytes per round", "All sites together."
    keys = _keys([("sites", "to the sites", ""), ("federated", "back to the server", "")])
    text = f"{title}; the numbers are in the table of rounds below."
    return _figure("traffic", title, note, keys, inline(figure, "b", title, text))


def _times(run: Run) -> str:
    figure = times(run)
    if figure is None:
        return ""
    title, note = "Time per round", words.spent(run) or "Wall time of each round."
    parts = (("federated", "training"), ("sites", "waiting"), ("before", "aggregation"))
    keys = _keys([(colour, label, "") for colour, label in parts])
    text = f"{title}; the numbers are in the table of rounds below."
    return _figure("times", title, note, keys, inline(figure, "t", title, text))


def _keys(items: Sequence[tuple[str, str, str]]) -> str:
    return '<ul class="keys">{}</ul>'.format(
        "".join(
            f'<li><span class="swatch {mark}" style="--c: var(--{colour})"></span>{label}</li>'
            for colour, label, mark in items
        )
    )


def _figure(key: str, title: str, note: str, keys: str, drawing: str) -> str:
    said = f'<p class="soft">{safe(note, 600)}</p>' if note else ""
    return (
        f'<figure class="card" id="{safe(key)}"><figcaption><h3>{safe(title)}</h3>{said}'
        f"</figcaption>{keys}\n{drawing}</figure>"
    )
