"""The report in a real browser, at the widths of a phone and of a desk, in both colour schemes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flower_app.report import write_report
from flower_app.report.numbers import score

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="chromium or chromedriver is not installed"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
PHONE, DESK = 360, 1280
ATTACK = "<script>alert(1)</script>"
IMAGE_ATTACK = '"><img src=x onerror="alert(2)">'


def _load_runs() -> Any:
    path = Path(__file__).with_name("report_runs.py")
    spec = importlib.util.spec_from_file_location("report_runs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by name: a small run, a large one, one in progress and one with hostile names."""
    runs, base = _load_runs(), tmp_path_factory.mktemp("runs")
    hostile = (ATTACK, IMAGE_ATTACK, "x" * 3000, "plain")
    folders = {
        "small": runs.make_run(base / "small"),
        "large": runs.make_large_run(base / "large"),
        "growing": runs.make_run(base / "growing", finished=False),
        "long": runs.make_run(base / "long", rounds=60, metric="accuracy"),
        "hostile": runs.make_run(
            base / "hostile",
            sites=hostile,
            bad_replies=((1, ATTACK, "quarantined", ATTACK), (2, "x" * 3000, "failed", "y" * 900)),
        ),
    }
    return {name: write_report(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


def _open(browser: Any, page: Path, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what came before is not this page's
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(x => x.open = true)")


NAMES = ("small", "large", "growing", "long", "hostile")


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", NAMES)
def test_page_fits_loads_nothing_and_shows_every_plot(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    _open(browser, pages[name], width)
    wide, room = browser.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    )
    assert wide <= room <= width
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in sent if m["method"].endswith("WillBeSent")}
    assert urls == {pages[name].as_uri()}
    _check_plots(browser, "Accuracy" if name == "long" else "Perplexity", width)


def _check_plots(browser: Any, metric: str, width: int) -> None:
    """All plots are there, of a good size, with legible text that is not cut at the edges."""
    plots = browser.execute_script(
        """return [...document.querySelectorAll('figure svg')].map(svg => {
            const box = svg.getBoundingClientRect();
            const style = getComputedStyle(svg);
            const cut = [...svg.querySelectorAll('text')].filter(text => {
              const b = text.getBoundingClientRect();
              return b.left < box.left - 1 || b.right > box.right + 1
                || b.top < box.top - 1 || b.bottom > box.bottom + 1;
            }).map(text => text.textContent);
            const small = [...svg.querySelectorAll('text')].map(
              text => parseFloat(getComputedStyle(text).fontSize) * box.width
                / svg.viewBox.baseVal.width);
            return {width: box.width, height: box.height, shown: style.visibility,
                    label: svg.querySelector('title').textContent, cut: cut,
                    smallest: Math.min(...small), shapes: svg.querySelectorAll('path').length};
        })"""
    )
    assert [plot["label"] for plot in plots] == [
        "Loss on held-out rows",
        f"{metric} on held-out rows",
        "Loss at each site",
        f"{metric} at each site",
        "Bytes per round",
        "Time per round",
    ]
    for plot in plots:
        assert plot["width"] > 0.75 * min(width, 500) and plot["height"] > 100
        assert plot["shown"] == "visible" and plot["shapes"] > 4
        assert plot["cut"] == []
        assert plot["smallest"] >= 8.5


def test_results_table_shows_the_summary_without_scrolling(
    browser: Any, pages: dict[str, Path]
) -> None:
    page = pages["small"]
    summary = json.loads((page.parent / "summary.json").read_text())
    for width in (PHONE, DESK):
        _open(browser, page, width)
        for key in ("zero_shot", "local", "federated", "central"):
            cells = browser.execute_script(
                "return [...document.querySelectorAll(`#results tr[data-row=${arguments[0]}] td`)]"
                ".map(cell => cell.innerText)",
                key,
            )
            wanted = [score(summary[key]["loss"]), score(summary[key]["perplexity"])]
            assert cells[:2] == wanted
        wide, room = browser.execute_script(
            "const e = document.querySelector('#results').parentElement;"
            "return [e.scrollWidth, e.clientWidth]"
        )
        assert wide <= room


def test_a_hostile_site_name_stays_text(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    guarded = pages["hostile"].read_text(encoding="utf-8")
    # Without the page's content policy, the escaping alone must hold.
    bare = tmp_path / "bare.html"
    bare.write_text(guarded.replace("Content-Security-Policy", "x-none"), encoding="utf-8")
    for page in (pages["hostile"], bare):
        _open(browser, page, DESK)
        with pytest.raises(NoAlertPresentException):
            _ = browser.switch_to.alert.text
        assert browser.execute_script("return document.querySelectorAll('script, img').length") == 0
        reasons = browser.execute_script("return document.querySelector('#left-out').innerText")
        assert ATTACK in reasons
        names = browser.execute_script("return document.querySelector('#sites-table').innerText")
        assert ATTACK in names and IMAGE_ATTACK in names


def test_the_content_policy_stops_a_script(browser: Any, pages: dict[str, Path]) -> None:
    text = pages["small"].read_text(encoding="utf-8")
    spoiled = pages["small"].with_name("spoiled.html")
    attack = "<body><script>document.title = 'taken'</script>"
    spoiled.write_text(text.replace("<body>", attack), encoding="utf-8")
    _open(browser, spoiled, DESK)
    assert "taken" not in browser.title
    assert any("Content Security Policy" in row["message"] for row in browser.get_log("browser"))


def test_the_scheme_follows_the_reader(browser: Any, pages: dict[str, Path]) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        _open(browser, pages["small"], DESK, scheme)
        seen[scheme] = browser.execute_script(
            """const style = s => getComputedStyle(document.querySelector(s));
            const label = [...document.querySelectorAll('#sites-loss svg text')]
              .find(text => text.textContent.trim() == 'asyncio');
            return [style('body').backgroundColor, style('body').color,
                    getComputedStyle(label).fill]"""
        )
    assert seen["light"] == ["rgb(246, 244, 238)", "rgb(35, 40, 43)", "rgb(35, 40, 43)"]
    assert seen["dark"] == ["rgb(20, 24, 26)", "rgb(233, 230, 223)", "rgb(233, 230, 223)"]
