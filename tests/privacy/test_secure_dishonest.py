"""Servers and sites that lie: they learn nothing, and are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from privacy.secure import site as steps
from privacy.secure.errors import SecureError
from privacy.secure.keys import NodeKey, Pinned, agree, bound, fresh, public, seal
from privacy.secure.site import Session
from strategies.exchange import Parcel
from tests.privacy.secure_groups import MODEL, NAMES, Group, keys, terms


def changed(parcel: Parcel, **columns: object) -> dict[str, Any]:
    return {**parcel, **columns}


def rows_of(parcel: Parcel, column: str) -> list[Any]:
    entry = parcel[column]
    assert isinstance(entry, Sequence)
    return list(entry)


def share(group: Group, name: str, message: Parcel) -> tuple[Session, Parcel]:
    return steps.share(group.sessions[name], message, group.keys[name], group.pinned)


def test_swapped_keys_are_noticed_and_their_owner_named() -> None:
    """The server puts a key of its own in place of a site's, to open what others seal for it."""
    group = Group(terms()).advertise()
    roster = group.mail["ann"]
    for column in ("sealing", "masking"):
        own = rows_of(roster, column)
        own[NAMES.index("bob")] = public(fresh())
        with pytest.raises(SecureError, match=r"advert of 'bob' .* the server changed it"):
            share(group, "ann", changed(roster, **{column: own}))
    swapped = rows_of(roster, "masking")
    swapped[1], swapped[2] = swapped[2], swapped[1]
    with pytest.raises(SecureError, match="advert of 'bob'"):
        share(group, "ann", changed(roster, masking=swapped))


def test_a_site_sees_its_own_keys_in_the_roster() -> None:
    group = Group(terms()).advertise()
    own = rows_of(group.mail["ann"], "sealing")
    own[0] = public(fresh())
    with pytest.raises(SecureError, match="Expected the keys that 'ann' advertised, got others"):
        share(group, "ann", changed(group.mail["ann"], sealing=own))
    without = {k: rows_of(group.mail["ann"], k)[1:] for k in group.mail["ann"]}
    with pytest.raises(SecureError, match="Expected the keys that 'ann' advertised, got none"):
        share(group, "ann", without)


def test_a_roster_of_an_earlier_round_is_refused() -> None:
    """A replay: adverts that were genuinely signed, for another round or another attempt."""
    earlier = Group(terms(round=1)).advertise()
    now = Group(terms(round=2)).advertise()
    with pytest.raises(SecureError, match="the server changed the roster, or repeats an old one"):
        share(now, "ann", earlier.mail["ann"])
    # Even with the site's fresh keys in it, the others' signatures are of another round.
    mixed = {
        column: [rows_of(now.mail["ann"], column)[0], *rows_of(earlier.mail["ann"], column)[1:]]
        for column in now.mail["ann"]
    }
    with pytest.raises(SecureError, match="Expected the advert of 'bob' under its pinned node key"):
        share(now, "ann", mixed)


def test_invented_sites_do_not_fill_a_roster() -> None:
    """A server cannot surround one site by sites of its own making."""
    group = Group(terms())
    fakes = {name: NodeKey.simulated(99, name) for name in NAMES}  # the server's own keys
    answers = {n: steps.advertise(group.terms, n, 3, fakes[n])[1] for n in NAMES if n != "ann"}
    group.sessions["ann"], answers["ann"] = steps.advertise(group.terms, "ann", 3, keys()["ann"])
    mail = group.server.advertised(answers)
    with pytest.raises(SecureError, match="Expected the advert of 'bob' under its pinned"):
        share(group, "ann", mail["ann"])
    few = Pinned({name: key.public for name, key in keys(NAMES[:4]).items()})
    honest = Group(terms()).advertise()
    with pytest.raises(SecureError, match="a site whose node key is pinned here, got 'eve'"):
        steps.share(honest.sessions["ann"], honest.mail["ann"], honest.keys["ann"], few)


@pytest.mark.parametrize("tell", ["roster of five", "other adverts"])
def test_a_roster_that_differs_between_sites_is_noticed(tell: str) -> None:
    """Each site's signature under its roster shows the others that they were told another one."""
    group = Group(terms()).advertise()
    mail = dict(group.mail)
    if tell == "roster of five":
        mail["ann"] = {column: rows_of(mail["ann"], column)[:5] for column in mail["ann"]}
    else:  # eve advertised twice, and the server shows ann the first advert, the others the second
        _, second = steps.advertise(group.terms, "eve", 3, group.keys["eve"])
        columns = {column: rows_of(mail["ann"], column) for column in mail["ann"]}
        names = {"sealing": "sealing", "masking": "masking", "signatures": "signature"}
        for column, name in names.items():
            columns[column][4] = second[name]
        mail["ann"] = columns
    answers: dict[str, Parcel] = {}
    for name in NAMES:
        group.sessions[name], answers[name] = share(group, name, mail[name])
    rest = [name for name in NAMES if name not in ("ann", "fay")]
    message = {
        "sites": rest,
        "sealed": [rows_of(answers[n], "sealed")[0] for n in rest],
        "signatures": [answers[n]["signature"] for n in rest],
    }
    with pytest.raises(SecureError, match="Expected the roster of 'bob' under its pinned node key"):
        steps.mask(group.sessions["ann"], message, group.numbers("ann"), MODEL, group.pinned)


def test_tampered_and_misdirected_shares_are_noticed() -> None:
    group = Group(terms()).advertise().share()
    message = group.mail["ann"]
    sealed = rows_of(message, "sealed")

    def mask(parts: list[bytes]) -> None:
        parcel = changed(message, sealed=parts)
        steps.mask(group.sessions["ann"], parcel, group.numbers("ann"), MODEL, group.pinned)

    mask(sealed)
    spoilt = bytes([sealed[0][0] ^ 1]) + sealed[0][1:]
    with pytest.raises(SecureError, match="the share that 'bob' sealed for this round"):
        mask([spoilt, *sealed[1:]])
    with pytest.raises(SecureError, match="the share that 'bob' sealed"):
        mask([sealed[1], sealed[0], *sealed[2:]])
    meant_for_cat = rows_of(group.mail["cat"], "sealed")
    with pytest.raises(SecureError, match="the share that 'bob' sealed"):
        mask([meant_for_cat[1], *sealed[1:]])


def test_nobody_but_the_receiver_opens_a_share() -> None:
    """What the server carries is sealed: a third site's key does not open it."""
    group = Group(terms()).advertise().share()
    roster = group.sessions["cat"].known
    sealed = rows_of(group.mail["ann"], "sealed")[0]
    way = ("seal", roster.digest, "bob", "ann")
    right = agree(group.sessions["ann"].sealing, roster.by_name["bob"].sealing, *way)
    wrong = agree(group.sessions["cat"].sealing, roster.by_name["bob"].sealing, *way)
    assert len({right, wrong}) == 2
    both = steps.unseal(right, sealed, bound("share", *way), "bob")
    assert seal(right, both, bound("share", *way)) == sealed
    with pytest.raises(SecureError):
        steps.unseal(wrong, sealed, bound("share", *way), "bob")


def test_nobody_is_both_active_and_dropped() -> None:
    group = Group(terms()).advertise().share().mask({"fay"})
    session = group.sessions["ann"]
    for active, dropped, text in [
        (NAMES[:5], ("bob", "fay"), "Expected 'bob' to be active or dropped, got it named as both"),
        (NAMES[:4], ("fay",), "as active or dropped, got ann, bob, cat, dan, fay"),
        (NAMES[1:5], ("ann", "fay"), "Expected the sites of this sum"),
        ((*NAMES[:5], "mallory"), ("fay",), "Expected the sites of this sum"),
        ((*NAMES[:5], "bob"), ("fay",), "Expected distinct names of active sites"),
        (NAMES[:4], ("eve", "fay"), "Expected at least 5 of 6 sites .* sent masked updates"),
    ]:
        message = {"active": list(active), "dropped": list(dropped)}
        with pytest.raises(SecureError, match=text):
            steps.confirm(session, message, group.keys["ann"])
    steps.confirm(session, {"active": list(NAMES[:5]), "dropped": ["fay"]}, group.keys["ann"])


def test_two_stories_of_who_dropped_out_open_nothing() -> None:
    """Told half the sites that eve is in the sum and half that she is not: none opens her."""
    group = Group(terms()).advertise().share().mask()
    stories = {
        name: (NAMES, ())
        if name in ("ann", "bob", "cat", "eve")
        else (tuple(n for n in NAMES if n != "eve"), ("eve",))
        for name in NAMES
    }
    signatures: dict[str, Any] = {}
    for name, (active, dropped) in stories.items():
        message = {"active": list(active), "dropped": list(dropped)}
        group.sessions[name], answer = steps.confirm(
            group.sessions[name], message, group.keys[name]
        )
        signatures[name] = answer["signature"]
    for name in NAMES:
        message = {"sites": list(NAMES), "signatures": [signatures[n] for n in NAMES]}
        with pytest.raises(SecureError, match=r"Expected (the survivors of|one signature of each)"):
            steps.unmask(group.sessions[name], message, group.pinned)
        same = [n for n in NAMES if group.sessions[n].active == group.sessions[name].active]
        few = {"sites": same, "signatures": [signatures[n] for n in same]}
        with pytest.raises(SecureError, match=r"Expected at least 5 .* confirmed the same sum"):
            steps.unmask(group.sessions[name], few, group.pinned)


def test_a_site_opens_one_secret_of_each_site() -> None:
    group = Group(terms()).advertise().share().mask({"fay"}).confirm()
    for name in NAMES[:5]:
        session = group.sessions[name]
        answer = steps.unmask(session, group.mail[name], group.pinned)
        assert answer["sites"] == list(NAMES)
        for of, given in zip(NAMES, rows_of(answer, "shares"), strict=True):
            seed, key = session.held[of]
            assert given == (key if of == "fay" else seed)


def test_a_wrong_share_keeps_the_sum_closed_and_is_named() -> None:
    for gone, victim in [((), "ann"), (("fay",), "fay")]:
        group = Group(terms()).advertise().share().mask(gone).confirm()
        answers = {
            n: steps.unmask(group.sessions[n], group.mail[n], group.pinned) for n in group.mail
        }
        shares = rows_of(answers["bob"], "shares")
        at = NAMES.index(victim)
        shares[at] = bytes(33)
        answers["bob"] = changed(answers["bob"], shares=shares)
        with pytest.raises(SecureError, match=f"secret of '{victim}', got some .* bob, .* closed"):
            group.server.opened(answers, MODEL)


@pytest.mark.parametrize(
    "parcel",
    [
        {}, {"sites": "ann", "sealed": "b"}, {"sites": ["ann"], "sealed": []},
        {"sites": list(NAMES[1:]), "sealed": [b""] * 5}, {"sites": 3, "sealed": 4},
        {"sites": list(NAMES[1:]), "sealed": [1] * 5, "signature": bytes(64)},
    ],
)  # fmt: skip
def test_a_site_that_sends_nonsense_has_dropped_out(parcel: Mapping[str, Any]) -> None:
    group = Group(terms()).advertise()
    answers = {n: share(group, n, group.mail[n]) for n in NAMES[1:]}
    group.sessions |= {name: session for name, (session, _) in answers.items()}
    group.mail = group.server.shared({n: p for n, (_, p) in answers.items()} | {"ann": parcel})
    assert group.server.failed["ann"].startswith("Expected ")
    total = group.mask().confirm().opened()
    assert np.array_equal(total, group.plain(NAMES[1:]))


@pytest.mark.parametrize("advert", [{}, {"sealing": b"short"}, {"magnitude": 31}, {"masking": 7}])
def test_a_site_that_advertises_nonsense_has_dropped_out(advert: Mapping[str, Any]) -> None:
    group = Group(terms())
    answers = {n: steps.advertise(group.terms, n, 3, keys()[n])[1] for n in NAMES}
    answers["ann"] = {**answers["ann"], **advert} if advert else {}
    group.mail = group.server.advertised(answers)
    assert set(group.mail) == set(NAMES[1:]) and "'ann'" in group.server.failed["ann"]


def test_masked_numbers_of_others_are_refused() -> None:
    group = Group(terms()).advertise().share({"fay"})
    data = bytes(group.terms.numbers.nbytes(5))
    for name in ("fay", "mallory"):
        with pytest.raises(SecureError, match=f"a site with shares, got '{name}'"):
            group.server.add(name, data)
    group.server.add("ann", data)
    with pytest.raises(SecureError, match="Expected one masked update"):
        group.server.add("ann", data)
    with pytest.raises(SecureError, match="bytes of masked numbers, got 3"):
        group.server.add("bob", b"123")


def test_a_key_that_everyone_would_know_is_refused() -> None:
    with pytest.raises(SecureError, match="full order"):
        agree(fresh(), bytes(32), "seal")
    assert agree(a := fresh(), public(b := fresh()), "x", 1) == agree(b, public(a), "x", 1)
    assert agree(a, public(b), "x", 1) != agree(a, public(b), "x", 2)


def test_bound_parts_cannot_be_moved_from_one_to_the_next() -> None:
    seen = {
        bound("a", "b", "c"),
        bound("a", "bc"),
        bound("a", "b", b"c"),
        bound("a", "1"),
        bound("a", 1),
    }
    assert len(seen) == 5
