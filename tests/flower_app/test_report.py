"""The report of a run folder, without a browser."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from flower_app.report import ReportError, page, read_run, tables, words, write_report
from flower_app.report.figures import MOST_SITES, drawn_sites
from flower_app.report.numbers import score
from flower_app.report.svg import MARKER


def _load_runs() -> Any:
    path = Path(__file__).with_name("report_runs.py")
    spec = importlib.util.spec_from_file_location("report_runs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = _load_runs()
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1}{0}$ & $x$",
    "evil\u202etxt.exe",
    "broken \ud800 half",
    "line\u2028break\x85and\nmore",
    "x" * 5000,
    "心血管内科与呼吸内科联合门诊部",
)
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects the elements of a page and insists that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: dict[str, list[str]] = {}
        self._row = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = {name: value or "" for name, value in attrs}
        self.attributes += list(found.items())
        self.ids += [found["id"]] if "id" in found else []
        if tag == "tr":
            self._row = found.get("data-row", "")
            self.cells.setdefault(self._row, [])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self._row and self.open and self.open[-1] == "td":
            self.cells[self._row].append(data)


def _html(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def _written(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def _summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = runs.make_run(tmp_path_factory.mktemp("small"))
    return write_report(folder).parent


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = runs.make_large_run(tmp_path_factory.mktemp("large"))
    return write_report(folder).parent


def test_page_is_well_formed_self_contained_and_complete(small: Path, large: Path) -> None:
    for folder in (small, large):
        text = _written(folder)
        found = Page(text)
        assert len(found.ids) == len(set(found.ids))
        assert not {"script", "link", "img", "iframe", "object", "form"} & set(found.tags)
        loading = {"src", "srcset", "action", "data", "poster"}
        assert not loading & {name for name, _ in found.attributes}
        links = [value for name, value in found.attributes if name in ("href", "xlink:href")]
        assert all(value.startswith("#") and value[1:] in found.ids for value in links)
        assert not any(name.startswith("on") for name, _ in found.attributes)
        assert "://" not in text and "@import" not in text
        assert set(re.findall(r"url\((.)", text)) <= {"#"}
        assert not any(marker in text for marker in MARKER.values())
        assert text.count("<figure") == text.count('role="img"') == 6
        assert text.index("<h1>") < text.index("<h2>") < text.index("<h3>")
        assert 'name="viewport"' in text and '<html lang="en">' in text


@pytest.mark.parametrize("metric", ["perplexity", "accuracy"])
def test_results_on_the_page_are_those_of_the_summary(tmp_path: Path, metric: str) -> None:
    folder = runs.make_run(tmp_path, metric=metric)
    summary, cells = _summary(folder), Page(_html(folder)).cells
    for key in ("zero_shot", "local", "federated", "central"):
        assert cells[key][:2] == [score(summary[key]["loss"]), score(summary[key][metric])]
    assert cells["local"][2:] == [
        score(summary["local"]["own_loss"]),
        score(summary["local"][f"own_{metric}"]),
    ]
    assert cells["central"][2:] == ["–", "–"]


def test_own_rows_are_the_mean_over_sites_when_only_the_metrics_have_them(small: Path) -> None:
    run = read_run(small)
    losses = [row["loss"] for row in run.per_site(run.evaluations[-1]).values()]
    assert run.summary["federated"]["own_loss"] == pytest.approx(sum(losses) / 4)
    assert run.summary["federated"]["loss"] == _summary(small)["federated"]["loss"]


def test_same_folder_same_bytes_and_matplotlib_as_it_was(small: Path) -> None:
    before = dict(matplotlib.rcParams)
    first = write_report(small).read_bytes()
    assert write_report(small).read_bytes() == first
    assert dict(matplotlib.rcParams) == before
    assert sorted(path.name for path in small.iterdir() if path.name.startswith(".")) == []


def test_a_failure_leaves_the_older_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.make_run(tmp_path)
    old = write_report(folder).read_bytes()

    def fail(run: object) -> str:
        raise MemoryError

    monkeypatch.setattr(page, "render", fail)
    with pytest.raises(MemoryError):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == old


def test_whatever_came_from_a_site_is_escaped(tmp_path: Path) -> None:
    bad = tuple((1, site, "quarantined", f"reason of {site}") for site in HOSTILE[:6])
    folder = runs.make_run(tmp_path, sites=HOSTILE, bad_replies=bad, name=HOSTILE[0])
    text = _html(folder)
    found = Page(text)
    assert "script" not in found.tags and "img" not in found.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\u202e" not in text and "\u2028" not in text
    assert "x" * 1000 not in text
    assert "$\\frac{1}{0}$ &amp;" in text


def test_left_out_replies_are_told_once_with_their_reason(large: Path) -> None:
    run = read_run(large)
    assert [(row[0], row[1], row[2]) for row in run.left_out()] == [
        (2, "hospital-05", "quarantined"),
        (2, "hospital-09", "failed"),
        (4, "hospital-05", "quarantined"),
        (7, "hospital-21", "missing"),
    ]
    text = _written(large)
    assert text.count("norm: L2 norm 81234.5 is above the limit 10000.") == 1
    assert "4 replies did not count" in text


def test_no_left_out_reply_is_said_too(small: Path) -> None:
    assert "None: every reply that came was well-formed and counted." in _written(small)


def test_missing_values_are_dashes(large: Path) -> None:
    text = _written(large)
    row = re.search(r'<th scope="row">hospital-03</th>(.*?)</tr>', text)
    assert row is not None and row[1].count(">–<") == 3
    assert not re.search(r">\s*(nan|none|inf)\s*<|\bnan\b", text)
    assert "were not measured in this run" in text
    assert 'data-row="central"' not in text and 'data-row="local"' not in text


def test_a_run_in_progress_shows_what_is_there(tmp_path: Path) -> None:
    folder = runs.make_run(tmp_path, finished=False)
    run, text = read_run(folder), _html(folder)
    assert not run.finished and run.unread_lines == 1
    assert "This run has not ended: 2 of 5 rounds finished so far, with 4 sites." in text
    assert "1 line of metrics.jsonl could not be read" in text
    cells = Page(text).cells
    assert cells["federated"][0] == score(run.evaluations[-1]["loss"])
    assert text.count("<figure") == 6


@pytest.mark.parametrize("kept", ["config.toml", "metrics.jsonl", "summary.json"])
def test_one_file_is_enough(tmp_path: Path, kept: str) -> None:
    folder = runs.make_run(tmp_path)
    for path in folder.iterdir():
        if path.name != kept:
            path.unlink()
    Page(_html(folder))


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    text = _html(tmp_path)
    assert "Nothing has been measured yet." in text
    assert "The first evaluation is not finished yet." in text


def test_of_a_round_done_again_the_later_rows_count(tmp_path: Path) -> None:
    folder = runs.make_run(tmp_path)
    row = {"kind": "round", "round": 5, "asked": 4, "ok": 3, "wall_s": 77.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    run = read_run(folder)
    assert len(run.rounds) == 5 and run.rounds[-1] == row


def test_a_summary_older_than_the_metrics_is_not_the_end(tmp_path: Path) -> None:
    folder = runs.make_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "round", "round": 6, "asked": 4, "ok": 4, "wall_s": 9.0}\n')
    assert not read_run(folder).finished


def test_lines_that_are_no_rows_are_counted(tmp_path: Path) -> None:
    folder = runs.make_run(tmp_path)
    lines = ["[1]", "null", "{", '{"kind": "round", "round": "two"}', "", "\xff"]
    with (folder / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write("\n".join(lines) + "\n")
    assert read_run(folder).unread_lines == 5


def test_a_line_separator_within_a_string_does_not_cut_a_row(tmp_path: Path) -> None:
    row = {"kind": "site", "round": 1, "site": "a\u2028b\x85c", "status": "ok"}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    run = read_run(tmp_path)
    assert run.unread_lines == 0 and run.sites == ("a\u2028b\x85c",)


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"Expected a run folder with metrics\.jsonl, .*got "):
        write_report(tmp_path / "nowhere")
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ReportError, match=r"Expected .*summary\.json' to hold one JSON object"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text('{"metric": ')
    with pytest.raises(ReportError, match="one JSON object"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_of_very_many_sites_the_worst_off_are_drawn(tmp_path: Path) -> None:
    folder = runs.make_run(tmp_path, sites=[f"s{n:03d}" for n in range(120)], rounds=2)
    run = read_run(folder)
    drawn = drawn_sites(run, "loss")
    final = {site: row["loss"] for site, row in run.per_site(run.evaluations[-1]).items()}
    assert len(drawn) == MOST_SITES and drawn == sorted(drawn)
    assert min(final[s] for s in drawn) >= max(final[s] for s in final if s not in drawn)
    text = _html(folder)
    assert f"Of 120 sites, the {MOST_SITES} that are worst off are drawn." in text
    assert len(re.findall(r'<th scope="row">s\d', text)) == 120


def _verdict(tmp_path: Path, **losses: float) -> str:
    summary = {"metric": "accuracy", "sites": [], "rounds": 1}
    scores = {key: {"loss": value} for key, value in losses.items()}
    (tmp_path / "summary.json").write_text(json.dumps({**summary, **scores}))
    return " ".join(words.verdict(read_run(tmp_path)))


def test_the_verdict_is_what_was_measured(tmp_path: Path) -> None:
    said = _verdict(tmp_path, zero_shot=4, local=3, federated=2.5, central=2)
    assert "lowered the loss on held-out rows from 4.000 to 2.500" in said
    assert "better than what sites reach alone (3.000 on average)" in said
    assert "closes 50 % of the gap" in said
    said = _verdict(tmp_path, zero_shot=2, local=2.5, federated=3, central=2)
    assert "raised the loss" in said and "worse than" in said and "gap" not in said
    said = _verdict(tmp_path, zero_shot=3, local=3, federated=1.9, central=2)
    assert "It matches training on all data pooled" in said
    assert "gap" not in _verdict(tmp_path, federated=2.5, local=3, central=3.5)
    assert _verdict(tmp_path, zero_shot=3) == ""


@pytest.mark.parametrize(("metric", "columns"), [("accuracy", 6), ("perplexity", 3)])
def test_every_site_has_its_accuracy_beside_its_loss(
    tmp_path: Path, metric: str, columns: int
) -> None:
    run = read_run(runs.make_run(tmp_path / "run", metric=metric))
    table = tables.sites(run)
    assert table.count("at start</th>") == columns // 3
    for site, found in run.per_site(run.evaluations[-1]).items():
        cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", table[table.index(f">{site}<") - 20 :])
        assert len(cells[3 : 3 + columns]) == columns
        shown = [cells[5], cells[8]] if metric == "accuracy" else [cells[5]]
        assert shown == [score(found[key]) for key in ("loss", metric)[: len(shown)]]
