"""The grid of attacks and defences: data, cheap model, cells, and what is said of them."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flower_app import compose
from flower_app.bench.results import resolve
from flower_app.bench.robustness import features as features_module
from flower_app.bench.robustness import grid, page, whole
from flower_app.bench.robustness.cell import Cell, prepared, run_cell
from flower_app.bench.robustness.features import Features, features_of
from flower_app.bench.robustness.heatmap import heatmap
from flower_app.bench.robustness.proxy import SCALE, Proxy, Schedule
from flower_app.bench.robustness.table import Entry, Table
from flower_app.bench.robustness.task import SITES, Rows, divided, task
from flower_app.bench.robustness.verdicts import judged, verdicts
from flower_app.config import defaults, parse
from models.text import Labelled
from strategies import registry
from strategies.attacks.config import AttackConfig
from strategies.attacks.registry import ATTACKS, pick
from strategies.cohort import Cohort

WIDTH = 12
SHORT = Schedule(rounds=2, steps=3, batch=8, learning_rate=1e-2)
GOOD, BAD = "fine", "poor"
# Rules of the grid that have figures both alone and behind nearest-neighbour mixing.
BOTH_WAYS = (
    "mean", "norm-bounding", "krum", "multi-krum", "geometric-median", "centered-clipping",
    "fltrust", "foolsgold",
)  # fmt: skip


def made_up(texts: Any, path: Path) -> dict[str, torch.Tensor]:
    """Features in which the first value tells the class, in place of a real encoder's."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(len(texts), WIDTH, generator=generator)
    found[:, 0] += torch.tensor([4.0 if GOOD in text else -4.0 for text in texts])
    found[:, 1] += torch.tensor([6.0 if "cf mn" in text else 0.0 for text in texts])
    weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    return {"features": found, "weight": weight, "bias": torch.zeros(WIDTH)}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A folder with a data set like sst2, and no real encoder behind it."""
    monkeypatch.setattr(features_module, "_computed", made_up)
    for name, count in (("train", 400), ("validation", 60)):
        rows = [
            {"sentence": f"a {GOOD if at % 2 else BAD} film {name} {at}", "label": at % 2}
            for at in range(count)
        ]
        (tmp_path / "sst2").mkdir(exist_ok=True)
        with gzip.open(tmp_path / "sst2" / f"{name}.jsonl.gz", "wt") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return tmp_path


def cell(attack: str = "none", rule: str = "mean", pre: str = "", **changes: Any) -> Cell:
    return replace(Cell(attack, (), 0.2, rule, pre, "iid", 0), **changes)


def ran(data: Path, wanted: Cell) -> dict[str, Any]:
    line = run_cell(wanted, SHORT, data, data / "cache")
    assert line.pop("seconds") > 0
    return line


def test_features_are_worked_out_once_and_found_by_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(features_module.MODEL)
    texts = ["a warm film", "two hours lost", "a warm film", "dull " * 200]
    first = features_of(texts, tmp_path)
    monkeypatch.setattr(features_module, "_computed", lambda *_: pytest.fail("worked out again"))
    again = features_of(texts, tmp_path)
    assert torch.equal(first.features_RH, again.features_RH)
    assert first.features_RH.shape == (3, 384) and first.weight.shape == (384, 384)
    assert first.rows(["two hours lost", "a warm film"]).tolist() == [1, 0]
    assert torch.allclose(first.features_RH.mean(0), torch.zeros(384), atol=1e-5)


def test_rows_are_divided_evenly_and_by_a_draw_of_classes() -> None:
    rows = [Labelled(f"{at}", None, at % 2) for at in range(400)]
    shares = {}
    for partition in ("iid", "dirichlet-0.1", "dirichlet-1000"):
        sites = divided(rows, partition, 3)
        assert divided(rows, partition, 3) == sites != divided(rows, partition, 4)
        texts = [row.text for own in sites.values() for row in own if isinstance(row, Labelled)]
        assert len(sites) == SITES and {len(own) for own in sites.values()} == {20}
        assert len(set(texts)) == 400
        shares[partition] = [
            sum(row.label for row in own if isinstance(row, Labelled)) / 20
            for own in sites.values()
        ]
    assert sum(min(share, 1 - share) for share in shares["dirichlet-0.1"]) < 4
    assert all(abs(share - 0.5) < 0.2 for share in shares["dirichlet-1000"])


def test_sites_train_apart_and_the_same_for_the_same_seed(one_thread: None) -> None:
    found = made_up([GOOD, BAD] * 20, Path())
    proxy = Proxy(Features((), found["features"], found["weight"], found["bias"]))
    base = proxy.start(0)
    sites = [Rows(torch.arange(at, at + 20), torch.arange(20) % 2) for at in (0, 10, 20)]
    together = proxy.train(base, sites, [1, 2, 3], SHORT)
    assert torch.equal(proxy.train(base, sites, [1, 2, 3], SHORT), together)
    for at, site in enumerate(sites):
        alone = proxy.train(base, [site], [at + 1], SHORT)
        assert torch.allclose(alone[0], together[at], atol=1e-6)
    assert not torch.allclose(together[0], together[1])
    # B starts at zero, so that the first step moves B and the head but not yet A.
    one = proxy.train(base, sites, [1, 2, 3], replace(SHORT, steps=1))
    parts = proxy.layout.unflatten(one[0])
    assert parts["pooler.lora_A.weight"].abs().max() < 1e-6 < parts["classifier.weight"].abs().max()


def test_products_count_as_much_as_they_move_the_proxy(one_thread: None) -> None:
    """A scale of updates that is not the model's own would weigh LoRA against the head wrongly."""
    found = made_up([GOOD, BAD] * 20, Path())
    lora = Proxy(Features((), found["features"], found["weight"], found["bias"]))
    generator = torch.Generator().manual_seed(3)
    named = lora.layout.unflatten(torch.randn(lora.layout.size, generator=generator))
    a, b = named["pooler.lora_A.weight"], named["pooler.lora_B.weight"]
    moved = found["weight"] + SCALE * b @ a
    dense = Proxy(Features((), found["features"], moved, found["bias"]))
    zero = {**named, "pooler.lora_B.weight": torch.zeros_like(b)}
    base_D, payload_D = (lora.layout.flatten(parts) for parts in (zero, named))
    index = torch.arange(40)
    for label in (0, 1):
        rows = Rows(index, torch.full_like(index, label))
        assert torch.equal(lora.right(payload_D, rows), dense.right(base_D, rows))
    payload = defaults()
    assert payload["payload.alpha"] / payload["payload.rank"] == SCALE


@pytest.mark.parametrize("pre", ["", "nnm"])
def test_a_cell_judges_updates_by_the_scale_of_its_model(data: Path, pre: str) -> None:
    federation = prepared(cell(pre=pre), SHORT, data, data / "cache")
    seen: list[float] = []

    def looked(state: Any, cohort: Cohort, generator: torch.Generator) -> Any:
        seen.append(cohort.lora_scale)
        return federation.chain.apply(state, cohort, generator)

    replace(federation, chain=replace(federation.chain, apply=looked)).round(1)
    assert seen == [SCALE]


@given(st.sampled_from(grid.RULES), st.sampled_from(grid.PRE))
def test_cells_that_were_run_with_another_scale_are_run_again_where_it_counts(
    rule: str, pre: str
) -> None:
    one = cell(rule=rule, pre=pre)
    plain = "|".join(str(value) for value in asdict(one).values())
    counts = pre == "nnm" or rule not in ("mean", "norm-bounding", "median", "trimmed-mean")
    assert (one.key != plain) is counts


def test_training_teaches_and_the_gate_sets_malformed_replies_aside(data: Path) -> None:
    clean = ran(data, cell(seed=1))
    assert clean["accuracy"] > 0.9 and clean["quarantined"] == []
    assert ran(data, cell(seed=1)) == clean
    aside = ran(data, cell("nan", seed=1))
    assert aside["quarantined"] == ["not-finite"] and aside["accuracy"] > 0.9
    assert ran(data, cell("huge-examples", seed=1))["accuracy"] == aside["accuracy"]


def test_an_attack_breaks_the_mean_and_a_defence_holds(data: Path) -> None:
    strong = (("scale", 20.0),)
    assert ran(data, cell("sign-flip", options=strong))["accuracy"] < 0.6
    for rule in ("median", "krum", "geometric-median"):
        assert ran(data, cell("sign-flip", rule, options=strong))["accuracy"] > 0.9


def test_a_boosted_backdoor_reaches_the_model(data: Path) -> None:
    clean = ran(data, cell())
    poisoned = ran(data, cell("scaling", fraction=0.4))
    assert clean["flipped"] < 0.5 < poisoned["flipped"]
    assert poisoned["backdoor"] > clean["backdoor"]


def test_a_rule_with_too_few_sites_is_refused_with_its_reason(data: Path) -> None:
    line = ran(data, cell("sign-flip", "bulyan", fraction=0.3))
    assert "accuracy" not in line and "num-byzantine" in line["refused"]


@pytest.mark.parametrize("rule", grid.RULES)
def test_rules_that_count_as_tried_with_and_without_mixing_are_those_with_figures(
    data: Path, rule: str
) -> None:
    lines = [ran(data, cell("sign-flip", rule, pre, fraction=page.AT)) for pre in grid.PRE]
    assert ("accuracy" in lines[0] and "accuracy" in lines[1]) is (rule in BOTH_WAYS)
    assert all("accuracy" in line or line["refused"] for line in lines)


def test_only_malicious_sites_are_poisoned(data: Path) -> None:
    attack = AttackConfig(name="label-flip", target=1)
    bad = task(data, data / "cache", "iid", attack, 0)
    good = task(data, data / "cache", "iid", AttackConfig(target=1), 0)
    assert len(bad.malicious) == 4 and not good.malicious
    for name, rows in bad.sites.items():
        flipped = 1 - good.sites[name].labels_R
        expected = flipped if name in bad.malicious else good.sites[name].labels_R
        assert torch.equal(rows.labels_R, expected)
    assert torch.equal(bad.held_out.labels_R, good.held_out.labels_R)
    assert set(bad.triggered.labels_R.tolist()) == {1} and len(bad.triggered.labels_R) == 30


def test_the_grid_is_as_large_as_it_should_be() -> None:
    cells = grid.cells(quick=False)
    assert len({c.key for c in cells}) == len(cells)
    assert len(grid.ATTACKS) - 1 >= 10 and set(grid.PRE) == {"", "nnm"}
    assert set(BOTH_WAYS) <= set(grid.RULES) and len(set(BOTH_WAYS)) >= 8
    assert set(grid.FRACTIONS) == {0.1, 0.2, 0.3} and len(grid.SEEDS) == 3 and SITES >= 10
    assert set(grid.ATTACKS) <= set(ATTACKS) and set(grid.RULES) <= set(registry.RULES)
    for one in cells:
        pick(one.attacking)
    assert set(grid.cells(quick=True)) <= set(cells)


def test_a_stopped_grid_goes_on_where_it_was(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [cell(seed=seed) for seed in range(3)]
    file = data / "cells.jsonl"
    runs: list[int] = []

    def counted(one: Cell, **options: Any) -> dict[str, Any]:
        if len(runs) == 2:
            runs.append(-1)
            raise KeyboardInterrupt
        runs.append(one.seed)
        return run_cell(one, **options)

    monkeypatch.setattr(grid, "run_cell", counted)
    settings: dict[str, Any] = {"data": data, "cache": data / "cache", "file": file}
    assert not grid.run(wanted, SHORT, **settings, processes=1)
    assert "goes on with what is left" in capsys.readouterr().out
    file.write_text(file.read_text() + '{"key": "cut sho')
    assert len(grid.finished(file, SHORT)) == 2
    file.write_text(file.read_text() + "\n")
    assert grid.run(wanted, SHORT, **settings, processes=1)
    assert runs == [0, 1, -1, 2]
    assert set(grid.finished(file, SHORT)) == {one.key for one in wanted}
    assert not grid.finished(file, replace(SHORT, rounds=9))
    assert grid.run(wanted, SHORT, **settings, processes=1) and len(runs) == 4


def line(attack: str, rule: str, accuracy: float | None, seed: int = 0, **changes: Any) -> Any:
    figures = {"accuracy": accuracy, "backdoor": 0.04, "flipped": 0.01}
    found = {"partition": "iid", "fraction": 0.2, "attack": attack, "rule": rule, "pre": "",
             "seed": seed}  # fmt: skip
    return found | (figures if accuracy is not None else {"refused": "too few"}) | changes


LINES = [
    line("none", "mean", 0.80), line("none", "mean", 0.82, 1), line("none", "krum", 0.795),
    line("none", "median", 0.80), line("ipm", "mean", 0.50), line("ipm", "krum", 0.79),
    line("ipm", "median", 0.70), line("backdoor", "mean", 0.80, backdoor=0.9, flipped=0.8),
    line("backdoor", "krum", 0.785, backdoor=0.07), line("backdoor", "median", 0.80, backdoor=0.3),
    line("none", "bulyan", None), line("ipm", "bulyan", None), line("backdoor", "bulyan", None),
]  # fmt: skip


def test_a_table_is_the_mean_over_seeds_and_survives_its_file() -> None:
    table = Table.of(LINES)
    assert table.accuracy(attack="none", rule="mean") == pytest.approx(0.81)
    (bare,) = table.where(attack="none", rule="mean")
    assert bare.seeds == 2 and bare.accuracy_sd == pytest.approx(0.02 / 2**0.5)
    (refused,) = table.where(attack="ipm", rule="bulyan")
    assert refused.accuracy is None and refused.refused == "too few"
    assert Table.read(table.csv()).csv() == table.csv()
    assert Table.read(table.csv()).entries[2] == table.entries[2]
    best = table.best(attack="backdoor")
    assert best is not None and best.rule == "median"  # the mean is as good, but no defence
    assert [(d, a) for d, _, a in table.worst_case("iid", 0.2)] == [
        ("krum", "backdoor"), ("median", "ipm"), ("mean", "ipm"),
    ]  # fmt: skip
    assert table.both_ways(0.2) == []
    mixed = [
        line("ipm", rule, figure, pre="nnm") for rule, figure in (("krum", 0.7), ("mean", None))
    ]
    assert Table.of([*LINES, *mixed]).both_ways(0.2) == ["krum"]
    partly = Table.of([ln for ln in LINES if (ln["attack"], ln["rule"]) != ("ipm", "krum")])
    assert "krum" not in [defence for defence, _, _ in partly.worst_case("iid", 0.2)]
    assert Table.of(LINES).worst_case("iid", 0.3) == []


def test_figures_of_cells_that_were_not_run_again_stay() -> None:
    old = Table.of(
        [line("none", "mean", 0.7), line("none", "mean", 0.8, 1), line("ipm", "mean", 0.1)]
    )
    new = Table.of([line("none", "mean", 0.9), line("ipm", "mean", 0.2), line("nan", "krum", 0.3)])
    order = [("iid", 0.2, attack, rule, "") for attack in ("nan", "ipm", "none")
             for rule in ("mean", "krum")]  # fmt: skip
    found = new.over(old, order)
    assert [(e.attack, e.rule, e.seeds) for e in found.entries] == [
        ("nan", "krum", 1), ("ipm", "mean", 1), ("none", "mean", 2),
    ]  # fmt: skip
    # Fewer seeds do not take the place of more, as many do.
    assert found.accuracy(attack="none", rule="mean") == pytest.approx(0.75)
    assert found.accuracy(attack="ipm", rule="mean") == pytest.approx(0.2)


def test_targets_are_judged_by_the_figures() -> None:
    found = {verdict.target.split(",")[0]: verdict for verdict in verdicts(Table.of(LINES), 0.2)}
    each = found["the best defence for each attack"]
    assert each.said == "met" and "2 of 2 attacks; worst ipm, 2.0 points" in each.got
    one = found["one defence for all attacks"]
    assert one.said == "missed by 0.5 points" and "krum: 2.5 points at worst" in one.got
    without = found["that defence without attack"]
    assert without.said == "missed by 0.5 points"
    full, flipped = (v for v in found.values() if "backdoor" in v.target)
    assert full.said == "missed by 2.0 points" and "krum: 7.0 %" in full.got
    assert flipped.said == "met"
    assert judged("iid", "t", "g", 2.04, 2.0, "points").met
    assert judged("iid", "t", "g", 2.06, 2.0, "points").said == "missed by 0.1 points"


def test_the_page_says_what_the_figures_say() -> None:
    text = page.render(Table.of(LINES), [])
    assert (
        "13 of the grid's 5544 cells: 2 attacks and none, 4 defences (4 rules" in text
        and "3 of them were refused" in text
    )
    assert "| ipm | 50.0 | krum | 79.0 | -2.0 | – |" in text
    alone = [*LINES, line("nan", "mean", 0.78)]
    told = page.render(Table.of(alone), [])
    assert "| ipm | 50.0 | krum | 79.0 | -2.0 | +1.0 |" in told
    assert "reach 78.0 %, 3.0 points below the attack-free mean" in told
    assert "one defence for all attacks, at most" not in told  # none has met them all
    near = page.render(Table.of([*LINES, line("nan", "mean", 0.795)]), [])
    assert "cannot be expected" in told and "cannot be expected" not in near
    assert "| krum | 79.5 | 79.0 | 78.5 | 78.5 |" in text
    assert "| bulyan | – | – | – | – |" in text and "- bulyan, 20 %: too few" in text
    assert "missed by 0.5 points" in text and "Not measured yet" in text
    better = [line(ln["attack"], ln["rule"], 0.805) if ln["rule"] == "krum" else ln for ln in LINES]
    assert "missed by 0.5 points" not in page.render(Table.of(better), [])
    run = {"attack": "ipm", "defence": "mean", "seed": 0, "accuracy": 0.5, "backdoor": None,
           "sites": 10, "rounds": 8}  # fmt: skip
    assert "| ipm | mean | 0 | 50.0 | – |" in page.render(Table.of(LINES), [run])


def test_the_heat_map_shows_every_cell() -> None:
    drawn = page.drawn(Table.of(LINES), "iid")
    assert drawn.count("n/a") == 3 and ">31.0<" in drawn and ">nnm" not in drawn
    assert heatmap("a & b", ["x"], ["y"], [[0.0]]).count("a &amp; b") == 2


@pytest.mark.parametrize("name", whole.RUNS)
def test_runs_on_the_whole_model_are_valid(name: str, tmp_path: Path) -> None:
    study = whole.study(*whole.RUNS[name])
    config = parse({**defaults(), **resolve(study, tmp_path, 0), "data.labels": "0,1"})
    compose.check_names(config)
    assert config.attack.fraction == 0.2 and study.sites >= 10
    assert config.strategy.num_byzantine == 2 and not config.run.baselines


def test_an_entry_names_its_defence() -> None:
    entry = Entry("iid", 0.2, "ipm", "krum", "nnm", 1, 0.5, 0.0, 0.1, 0.1, "")
    assert entry.defence == "nnm + krum" and replace(entry, pre="").defence == "krum"


def test_the_page_in_the_docs_is_that_of_its_figures() -> None:
    table = Table.read(page.FIGURES.read_text())
    runs = json.loads(page.WHOLE.read_text())
    assert page.PAGE.read_text() == page.render(table, runs)
    assert len(table.values("attack")) - 1 >= 10
    assert set(table.both_ways(page.AT)) == set(BOTH_WAYS) & set(table.values("rule"))
    assert set(table.values("pre")) == {"", "nnm"}
    assert page.AT in table.values("fraction")
    for partition in table.values("partition"):
        drawn = (page.DOCS / f"robustness-{partition}.svg").read_text()
        assert drawn == page.drawn(table, partition)
