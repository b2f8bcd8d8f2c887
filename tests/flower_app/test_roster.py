"""The roll call: who takes part, who does not and why, and how long anyone is waited for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from flwr.app import Error, Message

from flower_app.node import versions
from flower_app.roster import Roster
from models.section import ConfigError
from strategies import messages
from tests.fakes import Answer, FakeGrid, Field, Site, at_the_server, silent

BASE = "c0ffee" * 10


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(messages, "_POLL_S", 0.001)  # look often
    with at_the_server():
        yield


def card(site: str, **changes: Field) -> dict[str, Field]:
    values: dict[str, Field] = {
        "site": site, "rows": 40, "held-out": 4, "base": BASE, "simulated": False,
        "partitions": 0, "versions": "flwr 1.41",
    }  # fmt: skip
    return values | {key.replace("_", "-"): value for key, value in changes.items()}


def member(site: str, *, late: int = 0, **changes: Field) -> Site:
    return lambda question: [Answer(report=card(site, **changes), record="member", late=late)]


def saying(report: dict[str, Field] | None, record: str = "member") -> Site:
    return lambda question: [Answer(report=report, record=record)]


def without(key: str) -> Site:
    return saying({name: value for name, value in card("eve").items() if name != key})


def roster(timeout: float = 5.0) -> Roster:
    return Roster(BASE, timeout)


def test_members_are_known_by_name_and_asked_once() -> None:
    grid = FakeGrid({907: member("ann", rows=12, held_out=3), 13: member("bob")})
    known = roster()
    assert dict(known.present(grid)) == {"ann": 907, "bob": 13}
    assert list(known.refresh(grid)) == ["ann", "bob"]
    ann = known.refresh(grid)["ann"]
    assert (ann.rows, ann.held_out, ann.simulated, ann.versions) == (12, 3, False, "flwr 1.41")
    assert sorted(grid.asked("query")) == [13, 907]
    question = grid.questions[0].content
    assert dict(question.config_records["question"]) == {"base": BASE, "run": "", "done": 0}


def test_a_new_node_hears_which_run_it_joins_and_how_far_it_is() -> None:
    grid = FakeGrid({1: member("ann")})
    known = Roster(BASE, 5.0, "a-run")
    known.assemble(grid, 1, 5.0, done=3)
    grid.sites[2] = member("bob")
    known.present(grid, 7)
    told = [dict(question.content.config_records["question"]) for question in grid.questions]
    assert told == [{"base": BASE, "run": "a-run", "done": done} for done in (3, 7)]


def test_only_newcomers_are_asked_and_those_who_left_are_gone() -> None:
    grid = FakeGrid({1: member("ann")})
    known = roster()
    known.refresh(grid)
    grid.sites[2] = member("bob")
    assert dict(known.present(grid)) == {"ann": 1, "bob": 2}
    del grid.sites[1]
    assert dict(known.present(grid)) == {"bob": 2}
    assert grid.asked("query") == [1, 2]


def test_a_site_with_another_base_model_takes_no_part_and_is_told_why() -> None:
    grid = FakeGrid({1: member("ann"), 2: member("eve", base="0" * 60)})
    with pytest.raises(ConfigError) as error:
        roster().assemble(grid, 2, 0.0)
    message = str(error.value)
    assert "Expected at least 2 sites (strategy.min-sites), got 1" in message
    assert "site 'eve'" in message and BASE[:12] in message and "0" * 12 in message
    assert "as model-path" in message


def test_a_site_that_was_mended_is_asked_again() -> None:
    grid = FakeGrid({1: member("ann"), 2: member("eve", base="other")})
    known = roster()
    assert list(known.refresh(grid)) == ["ann"]
    del grid.sites[2]
    known.refresh(grid)
    grid.sites[2] = member("eve")
    assert list(known.refresh(grid)) == ["ann", "eve"]


@pytest.mark.parametrize("seed", range(5))
def test_of_two_sites_of_one_name_the_first_stays(seed: int) -> None:
    grid = FakeGrid({50: member("ann"), 60: member("bob")}, seed=seed)
    known = roster()
    known.refresh(grid)
    grid.sites[7] = member("ann")  # a lower node id is no claim to the name
    assert dict(known.present(grid)) == {"ann": 50, "bob": 60}
    del grid.sites[50]  # gone for good: the other one is the site started anew
    assert dict(known.present(grid)) == {"ann": 7, "bob": 60}


@pytest.mark.parametrize("seed", range(5))
def test_two_of_one_name_at_once_are_told_apart_the_same_way_each_time(seed: int) -> None:
    grid = FakeGrid({node: member("ann") for node in (50, 7, 60)}, seed=seed)
    assert dict(roster().present(grid)) == {"ann": 7}


def test_a_warning_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "flower_app.roster.log", lambda level, text, *args: said.append(text % args)
    )
    here = {"versions": versions()}
    grid = FakeGrid(
        {1: member("ann", **here), 2: member("ann", **here), 3: member("eve", base="x"),
         4: member("bob")}
    )  # fmt: skip
    known = roster()
    for _ in range(3):
        known.refresh(grid)
    assert len(said) == 3
    assert any("Two nodes call themselves 'ann'" in text for text in said)
    assert any("bob runs flwr 1.41, the server flwr 1.41.0, torch" in text for text in said)


MALFORMED: dict[str, Site] = {
    "no record": saying(None),
    "another record": saying(card("eve"), record="members"),
    "empty record": saying({}),
    "no name": without("site"),
    "no rows": without("rows"),
    "no base": without("base"),
    "empty name": saying(card("")),
    "blank name": saying(card("  ")),
    "endless name": saying(card("x" * 201)),
    "name is a number": saying(card("eve") | {"site": 7}),
    "name is a list": saying(card("eve") | {"site": ["eve"]}),
    "rows are text": saying(card("eve", rows="40")),
    "rows are a fraction": saying(card("eve", rows=4.5)),
    "rows are a truth": saying(card("eve", rows=True)),
    "no row": saying(card("eve", rows=0)),
    "negative rows": saying(card("eve", rows=-1)),
    "negative held-out": saying(card("eve", held_out=-1)),
    "simulated as text": saying(card("eve", simulated="false")),
    "negative partitions": saying(card("eve", partitions=-1)),
    "base is a number": saying(card("eve", base=1)),
    "says no": saying({"error": "Expected a site of at least 2 rows, got 1."}),
    "raised": lambda question: [Answer(error=Error(2, "it broke"))],
    "raised without a reason": lambda question: [Answer(error=Error(2))],
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_answer_keeps_only_its_own_site_out(fault: str) -> None:
    grid = FakeGrid({1: member("ann"), 2: MALFORMED[fault], 3: member("bob")})
    known = roster()
    assert dict(known.present(grid)) == {"ann": 1, "bob": 3}
    with pytest.raises(ConfigError, match=r"at least 3 sites .*, got 2: .+\. Start"):
        known.assemble(grid, 3, 0.0)


def test_the_reasons_of_a_site_are_passed_on_but_not_at_any_length() -> None:
    for answer in (Answer(report={"error": "x" * 9000}, record="member"),
                   Answer(error=Error(2, "x" * 9000))):  # fmt: skip
        grid = FakeGrid({1: lambda question, a=answer: [a]})  # type: ignore[misc]
        with pytest.raises(ConfigError) as error:
            roster().assemble(grid, 1, 0.0)
        assert "xxx" in str(error.value) and len(str(error.value)) < 2500


def test_a_run_starts_when_enough_sites_are_here() -> None:
    grid = FakeGrid({1: member("ann")})
    looks = 0

    def joining() -> Iterable[int]:
        nonlocal looks
        looks += 1
        if looks == 3:
            grid.sites[2] = member("bob")
        return list(grid.sites)

    grid.get_node_ids = joining  # type: ignore[method-assign]
    started = time.monotonic()
    assert list(roster().assemble(grid, 2, 30.0)) == ["ann", "bob"]
    assert looks >= 3 and time.monotonic() - started < 10


def test_waiting_for_sites_ends_at_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"at least 2 sites .*got 1\. Start more sites"):
        roster(0.01).assemble(FakeGrid({1: member("ann"), 2: silent}), 2, 0.2)
    assert 0.15 < time.monotonic() - started < 5


def test_a_simulation_waits_for_all_its_partitions() -> None:
    simulated = {"simulated": True, "partitions": 3}
    grid = FakeGrid({1: member("ann", **simulated), 2: member("bob", late=400, **simulated),
                     3: member("eve", late=30, **simulated)})  # fmt: skip
    assert list(roster().assemble(grid, 1, 20.0)) == ["ann", "bob", "eve"]


def test_a_simulation_with_sites_that_cannot_take_part_does_not_wait_for_others() -> None:
    simulated = {"simulated": True, "partitions": 2}
    grid = FakeGrid({1: member("ann", **simulated), 2: saying({"error": "No rows."})})
    assert list(roster().assemble(grid, 1, 600.0)) == ["ann"]
    started = time.monotonic()
    with pytest.raises(ConfigError, match="got 1: No rows"):
        roster().assemble(grid, 2, 600.0)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("simulated", [True, False])
def test_a_site_that_claims_a_thousand_partitions_holds_no_one_up_for_good(simulated: bool) -> None:
    liar = member("eve", simulated=simulated, partitions=1000)
    grid = FakeGrid({1: member("ann"), 2: liar})
    started = time.monotonic()
    assert list(roster().assemble(grid, 2, 0.2)) == ["ann", "eve"]
    assert time.monotonic() - started < 5


def test_a_node_that_is_slow_to_answer_is_asked_once_and_counts_when_it_does() -> None:
    grid = FakeGrid({1: member("ann"), 2: member("bob", late=10**9)})
    known = roster(timeout=0.5)
    assert list(known.refresh(grid)) == ["ann"]
    started = time.monotonic()
    for _ in range(20):
        assert list(known.refresh(grid)) == ["ann"]
    assert time.monotonic() - started < 5  # nobody waits for it a second time
    assert sorted(grid.asked("query")) == [1, 2]
    (name,) = known._late
    grid._waiting[name] = [(0, reply) for _, reply in grid._waiting[name]]
    assert list(known.refresh(grid)) == ["ann", "bob"]
    assert sorted(grid.asked("query")) == [1, 2]


def test_a_node_that_could_not_be_reached_is_asked_again() -> None:
    grid = FakeGrid({1: member("ann"), 2: member("bob")}, unsendable=frozenset({2}))
    known = roster()
    assert list(known.refresh(grid)) == ["ann"]
    grid.unsendable = frozenset()
    assert list(known.refresh(grid)) == ["ann", "bob"]


def test_an_answer_in_the_name_of_another_node_changes_nothing() -> None:
    def two_faced(question: Message) -> Iterable[Answer]:
        own = Answer(report=card("eve"), record="member")
        return [own, replace(own, node=999), replace(own, node=1, report=card("eve-too"))]

    grid = FakeGrid({1: member("ann")})
    known = roster()
    known.refresh(grid)
    grid.sites[2] = two_faced
    assert dict(known.present(grid)) == {"ann": 1, "eve": 2}


@pytest.mark.parametrize("name", ["Zürich", "病院", "a b", "a\u2028b", "<b>&", "-", "../x"])
def test_any_name_will_do(name: str) -> None:
    assert list(roster().refresh(FakeGrid({1: member(name)}))) == [name]


def test_nobody_is_there() -> None:
    with pytest.raises(ConfigError, match=r"at least 1 sites .*got 0"):
        roster().assemble(FakeGrid({}), 1, 0.0)
