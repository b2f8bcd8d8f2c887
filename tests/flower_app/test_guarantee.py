"""What a run guarantees, in its summary, report, model card and on the terminal."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flower_app import compose
from flower_app.account import ServerAccount
from flower_app.card import model_card
from flower_app.config import parse
from flower_app.guarantee import guarantee
from flower_app.releases import passes
from flower_app.report import read_run, results_table, words, write_report
from privacy.accounting import epsilon, spent
from privacy.events import Event
from privacy.tokens import epsilon_of_vectors
from tests.flower_app.nodes import Nodes
from tests.flower_app.report_runs import make_run

DP: dict[str, Any] = {"privacy__unit": "record", "privacy__noise_multiplier": 2.0}
ROWS = {"east": 20, "north": 40, "west": 20, "never-asked": 4}


def site(name: str, round_: int, status: str = "ok", **more: Any) -> dict[str, Any]:
    return {"kind": "site", "site": name, "round": round_, "status": status, **more}


METRICS = [
    {"kind": "round", "round": 1},
    site("refused", 0, "refused"),
    *[site("east", round_) for round_ in (1, 2, 3)],
    site("north", 1, examples=40), site("north", 2, "missing"), site("north", 3),
    site("west", 2), site("west", 2),
]  # fmt: skip


def of(nodes: Nodes, released: list[Event] | None = None, **keys: Any) -> dict[str, Any]:
    told = guarantee(parse(nodes.flat(**keys)), METRICS, ROWS, released or [])
    return dict(json.loads(json.dumps(told)))  # as a file gives it back


def test_a_plain_run_guarantees_nothing(nodes: Nodes) -> None:
    assert of(nodes) == {"unit": "none"}


def test_the_worst_site_is_the_runs_epsilon(nodes: Nodes) -> None:
    told = of(nodes, **DP)
    assert told["sites"] == {
        "east": epsilon(2.0, 4 / 20, 6, 1e-5),
        "north": epsilon(2.0, 4 / 40, 6, 1e-5),  # asked, if not heard: it may have trained
        "west": epsilon(2.0, 4 / 20, 2, 1e-5),
    }
    assert told["epsilon"] == told["sites"]["east"] == max(told["sites"].values())
    assert (told["unit"], told["delta"], told["relation"], told["accountant"]) == (
        "record", 1e-5, "zero-out", "PLD",
    )  # fmt: skip
    assert "this run alone" in told["assumptions"][-1]
    seeded = of(nodes, privacy__noise_source="seeded", **DP)
    assert any("protects nobody" in said for said in seeded["assumptions"])


def test_noised_scores_are_paid_by_the_held_out_rows(nodes: Nodes) -> None:
    keys = DP | {
        "privacy__metrics": "noised", "privacy__metrics_noise_multiplier": 4.0,
        "privacy__noise_multiplier": 9.0,
    }  # fmt: skip
    # Two scores in each of 3 rounds and one at the end; with a part of the sites in a round all
    # are asked at the start as well.
    assert of(nodes, **keys)["sites"]["east"] == epsilon(4.0, 1.0, 7, 1e-5)
    seldom = of(nodes, train__score_every=2, **keys)  # in rounds 1 and 3
    assert seldom["sites"]["east"] == epsilon(4.0, 1.0, 5, 1e-5)
    sampled = of(nodes, strategy__fraction=0.5, **keys)
    assert sampled["sites"]["east"] == epsilon(4.0, 1.0, 8, 1e-5)


def test_rounds_done_twice_count_twice_as_at_the_sites(nodes: Nodes) -> None:
    asked = [
        {"kind": "train", "round": 1, "sites": ["east", "west"]},
        {"kind": "train", "round": 2, "sites": ["east"]},
        {"kind": "train", "round": 2, "sites": ["east", "west"]},
        {"kind": "evaluate", "round": 2, "sites": ["east", "west"]},
        {"kind": "evaluate", "round": 2, "sites": ["east", "west"]},
    ]
    config = parse(nodes.flat(**DP))
    told = guarantee(config, METRICS, ROWS, [], asked=asked)
    assert told["sites"]["east"] == epsilon(2.0, 4 / 20, 8, 1e-5)  # rounds 1, 2, 2 and 3
    assert told["sites"]["west"] == epsilon(2.0, 4 / 20, 4, 1e-5)
    noised = DP | {
        "privacy__metrics": "noised", "privacy__metrics_noise_multiplier": 4.0,
        "privacy__noise_multiplier": 9.0,
    }  # fmt: skip
    told = guarantee(parse(nodes.flat(**noised)), METRICS, ROWS, [], asked=asked)
    # Two scores in each of 4 rounds, and two at the end.
    assert told["sites"]["east"] == epsilon(4.0, 1.0, 10, 1e-5)


def test_noise_at_the_server_is_taken_from_its_ledger(nodes: Nodes, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "privacy__unit": "client", "privacy__noise_multiplier": 3.0,
        "run__output_dir": str(tmp_path / "runs"),
    }  # fmt: skip
    config = parse(nodes.flat(**keys))
    event = Event("gaussian", "client", 3.0, 0.5, noise_at="server")
    for run in ("a-run", "another"):
        account = ServerAccount(config, run)
        for round_ in (1, 2):
            account.charge(replace(event, round=round_))
    assert len(account.ledger.events()) == 4
    told = of(nodes, ServerAccount(config, "a-run").events(), **keys)
    assert told["epsilon"] == spent([event] * 2, 1e-5)
    assert told["sites"] == {}
    assert any("server adds the noise" in said for said in told["assumptions"])
    assert any("run folder is not covered" in said for said in told["assumptions"])
    assert not any("repeats" in said for said in told["assumptions"])


def test_noise_on_a_stream_is_told_beside_that_records_have_none(nodes: Nodes) -> None:
    keys: dict[str, Any] = {
        "payload__kind": "split", "split__noise": 9.0, "split__clip_norm": 1.0,
        "split__clip_gradient": 1.0,
    }  # fmt: skip
    config, told = parse(nodes.flat(**keys)), of(nodes, **keys)
    assert told["unit"] == "none" and "epsilon" not in told
    # Where nobody says how many batches an epoch has, a bound takes their place.
    vectors = 3 * 2 * passes(config, ROWS["east"], 1)
    assert told["stream"]["sites"]["east"] == epsilon_of_vectors(9.0, 1e-5, vectors)
    assert told["stream"]["epsilon"] == max(told["stream"]["sites"].values())


def test_seeded_noise_is_told_to_protect_nobody(nodes: Nodes) -> None:
    told = of(nodes, **DP, privacy__noise_source="seeded")
    assert any("protects nobody" in said for said in told["assumptions"])


@pytest.fixture
def card(nodes: Nodes) -> Any:
    def written(told: dict[str, Any], **keys: Any) -> str:
        facts = {"sites": ["a"], "rounds": 2, "trainable_parameters": 5, "base": "c0ffee"}
        facts["classes"] = 3
        return model_card(parse(nodes.flat(**keys)), facts | {"privacy": told})

    return written


def test_the_model_card_says_what_is_true(nodes: Nodes, card: Any) -> None:
    assert "No differential privacy was applied" in card({"unit": "none"})
    told = of(nodes, **DP)
    text = card(told, **DP)
    assert f"Differential privacy: {told['text']}. It rests on this:" in text
    assert all(f"- {assumption}\n" in text + "\n" for assumption in told["assumptions"])
    assert "No differential" not in text
    nothing = of(nodes, [Event("none", "client", noise_at="server")], **DP)
    assert nothing["epsilon"] is None
    assert "it guarantees nothing" in card(nothing)


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_model_loads_as_the_card_says(
    nodes: Nodes, card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, kind: str
) -> None:
    """With its trained head: it scores as the module that was saved."""
    keys: dict[str, Any] = {"payload__kind": kind, "model__task": task}
    if task == "classification":
        keys |= {"data__format": "classification", "model__num_labels": 3}
    trained = compose.attach(config := parse(nodes.flat(**keys)), compose.load_base(config))
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    trained.save(tmp_path / "adapter")

    (code,) = re.findall(r"```python\n(.*?)```", card({"unit": "none"}, **keys), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / nodes.model.name).symlink_to(nodes.model)  # the card names no path
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec", dont_inherit=True), names)
    ids = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        expected, loaded = trained.module.eval()(ids).logits, names["model"].eval()(ids).logits
    assert torch.equal(loaded, expected)
    assert loaded.shape[-1] == (3 if task == "classification" else 300)


def test_the_card_says_where_the_embedded_model_is(card: Any) -> None:
    assert "`$FLORILEGIUM_CACHE`" in card({"unit": "none"}, model__name="embedded")
    assert "FLORILEGIUM_CACHE" not in card({"unit": "none"})


def test_the_report_and_the_terminal_say_it_too(nodes: Nodes, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    plain = write_report(folder).read_text("utf-8")
    assert "no claim of differential privacy" in plain
    assert "Privacy  " not in results_table(summary)

    told = of(nodes, **DP)
    summary["privacy"] = told
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    page = html.unescape(write_report(folder).read_text("utf-8"))
    assert "no claim of differential privacy" not in page
    assert f"Differential privacy: {told['text']}." in page
    assert all(assumption in page for assumption in told["assumptions"])
    assert "The records of the sites spent between" in page
    assert "losses, times and counts" not in page
    lines = [line for line in results_table(summary).splitlines() if line.startswith("Privacy")]
    assert len(lines) == 1 and "per record, delta 1e-05" in lines[0]
    assert 0 <= float(lines[0].split()[2]) / told["epsilon"] - 1 < 0.01  # rounded up, never down


@pytest.mark.parametrize("kind", ["masks", "ckks"])
def test_secure_aggregation_is_named_on_the_card_and_in_the_report(
    card: Any, tmp_path: Path, kind: str
) -> None:
    assert "ecure aggregation" not in card({"unit": "none"})
    row = f"| Secure aggregation | `{kind}`: the server saw sums over groups of sites only; "
    text = card({"unit": "none"}, secure__aggregation=kind)
    assert f"\n{row}docs/privacy.md says on what that rests |\n| Local training |" in text

    folder = make_run(tmp_path / "run")
    assert "ecure aggregation" not in write_report(folder).read_text("utf-8")
    summary = folder / "summary.json"
    told = json.loads(summary.read_text("utf-8")) | {"secure_aggregation": kind}
    summary.write_text(json.dumps(told), "utf-8")
    page = html.unescape(write_report(folder).read_text("utf-8"))
    assert f"<dt>Secure aggregation</dt><dd>{kind}</dd>" in page
    assert f"by secure aggregation (“{kind}”): the server saw sums over groups of sites" in page


def test_a_secure_run_that_has_not_ended_says_so_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    config = folder / "config.toml"
    assert words.secure(read_run(folder)) == ""
    config.write_text(config.read_text("utf-8") + '\n[secure]\naggregation = "masks"\n', "utf-8")
    assert words.secure(read_run(folder)) == "masks"
    assert any("no single site's update" in said for said in words.travelled(read_run(folder)))


@pytest.mark.parametrize(
    "told",
    [
        "yes",
        3,
        None,
        {},
        {"unit": "none"},
        {"unit": "token", "epsilon": 1.0},
        {"unit": ["record"]},
        {"unit": "none", "stream": "yes"},
        {"unit": "none", "stream": {"epsilon": "little"}},
    ],
)
def test_a_report_claims_nothing_that_it_does_not_know(tmp_path: Path, told: object) -> None:
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text("utf-8")) | {"privacy": told}
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    assert "no claim of differential privacy" in words.privacy(read_run(folder))[0]
    assert "Privacy" not in results_table(summary)


def test_a_run_that_has_not_ended_states_no_epsilon(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    config = folder / "config.toml"
    config.write_text(config.read_text("utf-8") + '\n[privacy]\nunit = "record"\n', "utf-8")
    said = words.privacy(read_run(folder))
    assert said == ["Noise protects each record; what it guarantees is accounted at the end."]
