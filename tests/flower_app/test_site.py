"""A site's rows are the same in simulation and deployment, and held-out rows are never learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flower_app.data.config import DataConfig
from flower_app.data.site import (
    Simulation,
    SiteRows,
    label_names,
    load_site,
    simulated_sites,
)
from flower_app.data.source import DataError
from models.text import Document, Labelled

SHARED = Path(__file__).parents[3] / "shared" / "data"


def config(**keys: object) -> DataConfig:
    """A data section with some keys set."""
    return DataConfig.model_validate(keys)


def written(path: Path, rows: list[dict[str, object]]) -> str:
    """Rows as JSON lines at `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def corpus(path: Path, *, each: int = 40) -> str:
    """Three sites' rows in turn, every fifth of which all sites share."""
    rows: list[dict[str, object]] = []
    for index in range(each):
        for site in ("north", "south", "west"):
            text = f"shared {index}" if index % 5 == 0 else f"{site} {index}"
            rows.append({"site": site, "text": text, "label": len(rows) % 2})
    return written(path, rows)


def deployed(chosen: DataConfig, site: str, path: str, eval_path: str | None = None) -> SiteRows:
    """The site as a node with its own files loads it, which knows no number of sites."""
    return load_site(chosen, seed=3, site=site, num_sites=0, data_path=path, eval_path=eval_path)


def test_simulation_and_deployment_give_a_site_the_same_rows(tmp_path: Path) -> None:
    source = corpus(tmp_path / "all.jsonl")
    chosen = config(source=source, max_rows=30)
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    for name in simulated_sites(chosen, 3, 3):
        simulated = load_site(chosen, seed=3, site=name, num_sites=3)
        path = written(tmp_path / "own.jsonl", [row for row in rows if row["site"] == name])
        assert deployed(chosen, name, path) == simulated
        assert len(simulated.train) + len(simulated.held_out) == 30
        assert simulated.train and simulated.held_out


def test_same_with_held_out_rows_of_their_own(tmp_path: Path) -> None:
    source = corpus(tmp_path / "all.jsonl")
    held: list[dict[str, object]] = [
        {"site": "north", "text": "north 3"},
        {"site": "south", "text": "new"},
        {"site": "north", "text": "other"},
    ]
    chosen = config(source=source, eval_source=written(tmp_path / "held.jsonl", held))
    simulated = load_site(chosen, seed=3, site="north", num_sites=3)
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    own = written(tmp_path / "own.jsonl", [row for row in rows if row["site"] == "north"])
    own_held = written(tmp_path / "own-held.jsonl", [held[0], held[2]])
    assert deployed(chosen, "north", own, own_held) == simulated
    assert simulated.held_out == [Document("north 3"), Document("other")]
    assert simulated.dropped_duplicates == 1
    assert Document("north 3") not in simulated.train and len(simulated.train) == 39


@pytest.mark.parametrize("kind", ["natural", "iid", "dirichlet"])
def test_no_row_is_learnt_anywhere_and_held_out_anywhere(tmp_path: Path, kind: str) -> None:
    chosen = config(source=corpus(tmp_path / "all.jsonl"), partition=kind, eval_fraction=0.3)
    sites = [load_site(chosen, seed=1, site=s, num_sites=3) for s in simulated_sites(chosen, 3, 1)]
    train = {record for site in sites for record in site.train}
    held_out = {record for site in sites for record in site.held_out}
    assert train and held_out and not train & held_out


def test_held_out_source_is_divided_over_the_sites(tmp_path: Path) -> None:
    held: list[dict[str, object]] = [{"text": f"held {index}"} for index in range(10)]
    held.append({"text": "shared 5"})
    chosen = config(
        source=corpus(tmp_path / "all.jsonl"),
        eval_source=written(tmp_path / "held.jsonl", held),
        partition="iid",
    )
    sites = [load_site(chosen, seed=1, site=s, num_sites=3) for s in simulated_sites(chosen, 3, 1)]
    assert [len(site.held_out) for site in sites] == [4, 4, 3]
    assert {record for site in sites for record in site.held_out} == {
        Document(str(row["text"])) for row in held
    }
    assert sum(site.dropped_duplicates for site in sites) == 3
    assert all(Document("shared 5") not in site.train for site in sites)


def test_one_reading_serves_all_sites(tmp_path: Path) -> None:
    chosen = config(source=corpus(tmp_path / "all.jsonl"))
    simulation = Simulation(chosen, 3, 3)
    names = list(simulation.parts)
    (tmp_path / "all.jsonl").unlink()
    assert [simulation.site(name).name for name in names] == names


def test_unknown_site_lists_the_choices(tmp_path: Path) -> None:
    chosen = config(source=corpus(tmp_path / "all.jsonl"))
    with pytest.raises(DataError, match=r"Unknown site 'nort'. Choices: north, south, west"):
        load_site(chosen, seed=0, site="nort", num_sites=3)


def test_site_with_one_row_trains_on_it_or_says_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path / "one.jsonl", [{"text": "only"}])
    rows = deployed(config(eval_fraction=0.0), "lone", path)
    assert (rows.train, rows.held_out) == ([Document("only")], [])
    with pytest.raises(DataError, match=r"at site 'lone', got 1, .*; lower it or add rows"):
        deployed(config(eval_fraction=0.999), "lone", path)
    with pytest.raises(DataError, match=r"at site 'lone', got 1, all of which are held-out rows"):
        deployed(config(), "lone", path, path)


def test_class_names_of_a_simulation_and_of_deployed_sites(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": f"t{index}", "label": "yxz"[index % 3], "site": "s"} for index in range(12)
    ]
    path = written(tmp_path / "a.jsonl", rows)
    words = config(source=path, format="classification", eval_fraction=0.0)
    assert label_names(words) == ("x", "y", "z")
    assert load_site(words, seed=0, site="s", num_sites=1).train[0] == Labelled("t0", None, 1)
    with pytest.raises(DataError, match=r"list the class names in data.labels"):
        deployed(words, "s", path)
    named = words.model_copy(update={"labels": "x,y,z", "partition": "own"})
    assert label_names(named) == ("x", "y", "z")
    assert deployed(named, "s", path).train[0] == Labelled("t0", None, 1)
    assert label_names(config(source=path)) == ()


def test_bad_rows_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"body": "t", "site": "s"}])
    with pytest.raises(DataError, match=r"column 'text' in data.source=.*columns body, site"):
        load_site(config(source=path), seed=0, site="s", num_sites=1)
    with pytest.raises(DataError, match=r"column 'text' .*columns body, site"):
        deployed(config(), "s", path)
    with pytest.raises(DataError, match=r"found nothing"):
        deployed(config(), "s", str(tmp_path / "gone.jsonl"))


REAL: list[tuple[int, dict[str, object]]] = [
    (20, {"source": "shakespeare_by_role/train.jsonl.gz", "partition_column": "client_id"}),
    (
        8,
        {
            "source": "sst2",
            "eval_source": "sst2",
            "format": "classification",
            "text_column": "sentence",
            "partition": "dirichlet",
            "partition_column": "label",
        },
    ),
    (
        10,
        {
            "source": "clinc150",
            "eval_source": "clinc150",
            "format": "classification",
            "label_column": "intent",
            "partition_column": "domain",
        },
    ),
    (4, {"source": "alpaca", "format": "instruct", "input_column": "input", "partition": "iid"}),
    (
        6,
        {
            "source": "zh_medical_dialogue",
            "format": "instruct",
            "prompt_column": "title",
            "input_column": "question",
            "answer_column": "answer",
            "partition_column": "department",
        },
    ),
    (
        2,
        {
            "source": "superglue/copa",
            "format": "choice",
            "prompt_column": "premise",
            "input_column": "question",
            "choices_column": "choice1,choice2",
            "partition": "iid",
        },
    ),
    (
        2,
        {
            "source": "superglue/boolq",
            "format": "choice",
            "prompt_column": "passage",
            "input_column": "question",
            "choices_column": "",
            "labels": "no,yes",
            "partition": "sizes",
            "sizes": "0.7,0.3",
        },
    ),
]


@pytest.mark.parametrize(("sites", "keys"), REAL, ids=lambda value: str(value)[:40])
def test_real_data_sets_load(sites: int, keys: dict[str, object]) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    paths = {k: str(SHARED / str(v)) for k, v in keys.items() if k in ("source", "eval_source")}
    simulation = Simulation(config(**keys | paths), sites, 0)
    found = [simulation.site(name) for name in simulation.parts]
    assert len(found) == sites
    assert all(site.train and site.held_out for site in found)
    train = {record for site in found for record in site.train}
    assert not train & {record for site in found for record in site.held_out}
