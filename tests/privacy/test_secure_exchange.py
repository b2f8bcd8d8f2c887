"""The exchange at the server: groups, replies that do not fit, and sums that are absurd."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layout import Layout
from models.section import ConfigError
from models.wire import RawArray
from privacy.secure import site as steps
from privacy.secure.config import SecureConfig
from privacy.secure.exchange import MASKED, MaskedIntake, Masks
from privacy.secure.groups import check_rule, drawn
from privacy.secure.keys import Pinned
from privacy.secure.site import Session
from privacy.secure.terms import Terms, model_hash
from strategies.cohort import CohortError
from strategies.config import StrategyConfig
from strategies.exchange import Parcel, Sent
from strategies.gate import Refusal, Reply
from tests.privacy.secure_groups import NAMES, keys, update

LAYOUT = Layout(("weight",), ((5,),))
SENT = Sent({"weight": torch.arange(5.0)}, {})
MODEL = model_hash(SENT.payload, SENT.fold)


class Sites:
    """Honest sites that answer what an exchange asks."""

    def __init__(self) -> None:
        self.keys = keys()
        self.pinned = Pinned({name: key.public for name, key in self.keys.items()})
        self.sessions: dict[str, Session] = {}

    def ask(self, step: str, parcels: Mapping[str, Parcel], timeout: float) -> dict[str, Parcel]:
        return {name: self.answer(step, name, parcel) for name, parcel in parcels.items()}

    def answer(self, step: str, name: str, parcel: Parcel) -> Parcel:
        key, pinned = self.keys[name], self.pinned
        if step == "secure_advertise":
            known = {k: parcel[k] for k in ("run", "round", "group", "layout", "size")}
            members = tuple(parcel["members"])  # type: ignore[arg-type]
            terms = Terms(**known, members=members, bits=32, range=1.0, settings="s")  # type: ignore[arg-type]
            self.sessions[name], given = steps.advertise(terms, name, 3, key)
        elif step == "secure_share":
            self.sessions[name], given = steps.share(self.sessions[name], parcel, key, pinned)
        elif step == "secure_confirm":
            self.sessions[name], given = steps.confirm(self.sessions[name], parcel, key)
        else:
            given = steps.unmask(self.sessions[name], parcel, pinned)
        return given

    def reply(self, intake: MaskedIntake, name: str, scale: float = 1.0) -> Reply:
        session = self.sessions[name]
        words, _ = session.terms.numbers.encode(scale * update(name, 5), 3, session.known.scale)
        self.sessions[name], hidden = steps.mask(
            session, intake.parcels[name], words, MODEL, self.pinned
        )
        data = session.terms.numbers.pack(hidden)
        array = RawArray("uint8", (len(data),), data)
        return Reply(name, 1, LAYOUT.digest, 3, {MASKED: array}, len(data))


def opened(sites: Sites, groups: int, max_norm: float = 1e4) -> MaskedIntake:
    secure = SecureConfig.model_validate({"aggregation": "masks", "groups": groups})
    return Masks(secure, LAYOUT, "r", "s", 0, max_norm).open(1, NAMES, lambda: SENT, sites.ask)


def test_each_group_is_a_row_with_its_weight() -> None:
    sites = Sites()
    with opened(sites, groups=2) as intake:
        for name in NAMES:
            intake.admit(sites.reply(intake, name))
        got = intake.close()
    assert set(got.rows) == {"group 1", "group 2"} and not got.failed
    assert got.counted == NAMES and set(got.weights.values()) == {9.0}
    for group, members in got.sites.items():
        mean = np.mean([update(name, 5) for name in members], axis=0)
        assert np.allclose(got.rows[group].numpy(), mean, atol=1e-6)


def test_replies_that_do_not_fit_are_refused() -> None:
    sites = Sites()
    intake = opened(sites, groups=1)
    good = sites.reply(intake, "ann")
    array = good.arrays[MASKED]
    for kind, changes in [
        ("unasked", {"site": "mallory"}),
        ("wrong-round", {"round": 2}),
        ("wrong-round", {"round": True}),
        ("layout", {"layout_digest": "other"}),
        ("extra-key", {"arrays": {"weight": array}}),
        ("extra-key", {"arrays": {MASKED: array, "weight": array}}),
        ("malformed-bytes", {"arrays": {MASKED: RawArray("uint8", (3,), b"abc")}}),
    ]:
        with pytest.raises(Refusal) as refused:
            intake.admit(Reply(**{**vars(good), **changes}))
        assert refused.value.kind == kind
    intake.admit(good)
    with pytest.raises(Refusal, match=r"^duplicate: "):
        intake.admit(good)


def test_an_absurd_sum_is_left_out() -> None:
    sites = Sites()
    intake = opened(sites, groups=1, max_norm=0.01)
    for name in NAMES:
        intake.admit(sites.reply(intake, name))
    got = intake.close()
    assert not got.rows and not got.sites
    assert "Expected a sum of 6 updates of an L2 norm of at most 0.01" in got.failed["ann"]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 20), st.integers(0, 99), st.integers(1, 9))
def test_groups_divide_the_sites_evenly(count: int, more: int, seed: int, round_: int) -> None:
    names = [f"site {at}" for at in range(3 * count + more)]
    groups = drawn(names, count, 3, seed, round_)
    assert sorted(name for group in groups for name in group) == sorted(names)
    sizes = {len(group) for group in groups}
    assert min(sizes) >= 3 and max(sizes) - min(sizes) <= 1
    assert drawn(names[::-1], count, 3, seed, round_) == groups
    with pytest.raises(CohortError, match=rf"secure\.groups={count + more + 1}"):
        drawn(names, count + more + 1, 3, seed, round_)


def test_groups_are_drawn_anew_in_each_round() -> None:
    names = [f"site {at}" for at in range(30)]
    assert len({str(drawn(names, 3, 3, 0, round_)) for round_ in range(10)}) == 10


@pytest.mark.parametrize(
    ("groups", "strategy", "text"),
    [
        (1, {"rule": "krum"}, "set secure.groups to compare sums of random groups"),
        (1, {"rule": "mean", "pre": "nnm"}, "strategy.pre='nnm'"),
        (4, {"rule": "lora-svd"}, "needs the factors of each site"),
        (1, {"rule": "mean"}, ""),
        (4, {"rule": "krum", "pre": "nnm"}, ""),
    ],
)
def test_rules_that_sums_are_enough_for(groups: int, strategy: dict[str, str], text: str) -> None:
    secure = SecureConfig.model_validate({"aggregation": "masks", "groups": groups})
    config = StrategyConfig.model_validate(strategy)
    if text:
        with pytest.raises(ConfigError, match=text):
            check_rule(secure, config)
    else:
        check_rule(secure, config)
        assert secure.on
